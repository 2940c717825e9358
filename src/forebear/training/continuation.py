"""The runs of further training: one model trained on without each of several groups of examples."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from forebear.data import Data, map_tensors, naming, require_finite
from forebear.errors import NonFiniteError, TaskError
from forebear.task import Loss, Task
from forebear.training import schedule
from forebear.training.ensemble import Ensemble, evaluate_model
from forebear.training.recipe import optimizer_of, seeded
from forebear.training.schemes import Removals
from forebear.training.stacked import (
    Gradients,
    Stack,
    State,
    chunks,
    gathered,
    repeated,
    stackable_data,
    state_of,
    warn_of_loop,
)

PROBE = 4
"""Examples with which it is found out what can be trained, and stacked."""


class Continuation:
    """A model ready to be trained on, stacked where that is possible.

    Attributes:
        excluded: names of trainable parameters that no gradient reaches; they are not trained.

    Args:
        settings: a `FurtherTraining`.
        task: what is trained on; its model is copied.
        data: the training set.
        removals: the runs.
        loop: whether a model that cannot be stacked may be trained one run at a time.

    Raises:
        TaskError: the model cannot be stacked and `loop` is off.
        NonFiniteError: the model's loss on a training example is NaN or infinite.
    """

    def __init__(
        self, settings: Any, task: Task, data: Data, removals: Removals, *, loop: bool = True
    ) -> None:
        self.settings = settings
        self.task = task
        self.removals = removals
        with task.evaluation():
            self.model = copy.deepcopy(task.model)
        if settings.double:
            self.model.double()
        self.template = copy.deepcopy(self.model)
        if settings.dropout == "shared":
            for module in self.model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.train()
        self.data = self.cast(data)
        require_finite_losses(task, self.template, self.data)
        self.trained, self.excluded = self._reached()
        randomness = "same" if settings.dropout == "shared" else "error"
        self._gradients = Gradients(self.model, task.loss, randomness=randomness)
        stackable = stackable_data(self.data)
        self._reason = self._why_not(stackable)
        if self._reason is None and stackable is not None:
            self.data = stackable
        elif loop:
            warn_of_loop("trained", self._reason or "")
        else:
            raise TaskError(f"torch.func cannot differentiate this task: {self._reason}")

    def cast(self, data: Data) -> Data:
        """`data` in double precision where that is asked for."""
        return doubled(data) if self.settings.double else data

    def parts(self) -> list[list[int]]:
        """Runs that are trained together."""
        runs = range(len(self.removals))
        if self._reason is not None:
            return [[run] for run in runs]
        size = sum(p.numel() for p in self.model.parameters())
        return list(chunks([self.removals.steps(run) for run in runs], size))

    def follow(
        self, runs: Sequence[int], seed: int, amounts: Sequence[float]
    ) -> Iterator[Ensemble]:
        """The models of some runs at each amount; each is overwritten when the next is asked for.

        Raises:
            NonFiniteError: a loss is NaN or infinite; names run, seed and step.
        """
        per_epoch = self.removals.steps(runs[0])
        marks = [steps_at(amount, per_epoch) for amount in amounts]
        epochs = -(-marks[-1] // per_epoch)
        orders = schedule.epoch_orders(len(self.data), epochs, seed)
        batches = self.removals.epochs(runs, orders)
        one = self._reason is not None
        steps = self._single(batches, seed) if one else self._stacked(len(runs), batches, seed)
        for step, (state, losses) in enumerate(steps, start=1):
            self._require_finite(losses, runs, seed, step)
            if step in marks:
                yield Ensemble(self.template, state)
            if step == marks[-1]:
                return

    def evaluate(self, models: Ensemble, function: Loss, data: Data) -> Tensor:
        """`function` of every model on every example, `[m, q]`; `data` as `cast` returns it."""
        if self._reason is None:
            return models.evaluate(function, data)
        with seeded(0):  # what draws random numbers must draw the same in all runs
            return torch.stack([evaluate_model(model, function, data) for model in models.models()])

    def _stacked(
        self, count: int, batches: Iterator[Any], seed: int
    ) -> Iterator[tuple[State, Tensor]]:
        """The stack after each step, and the losses `[m]` before it."""
        stack = self._stack(count)
        for step, (rows, weights) in enumerate(batches):
            with self._drawn(seed, step):
                losses = stack.step(self._gradients, self.data, rows, weights)
            yield stack.state, losses

    def _stack(self, count: int) -> Stack:
        return Stack(
            repeated(state_of(self.model), count),
            self.trained,
            lambda parameters, fused=None: optimizer_of(self.settings, parameters, fused=fused),
            clip=self.settings.clip,
        )

    def _single(self, batches: Iterator[Any], seed: int) -> Iterator[tuple[State, Tensor]]:
        """The same for one model by plain autograd."""
        model = copy.deepcopy(self.model)
        named = dict(model.named_parameters())
        parameters = [named[name] for name in self.trained]
        optimizer = optimizer_of(self.settings, parameters)
        for step, (rows, weights) in enumerate(batches):
            flat, device = rows.reshape(-1), parameters[0].device
            optimizer.zero_grad()
            with self._drawn(seed, step), torch.enable_grad():
                losses = self.task.losses(model, gathered(self.data, flat, device))
            loss = (losses * weights[0].to(losses)).sum()
            loss.backward(inputs=parameters)
            if self.settings.clip is not None:
                nn.utils.clip_grad_norm_(parameters, self.settings.clip)
            optimizer.step()
            yield {k: v[None] for k, v in state_of(model).items()}, loss.detach()[None]

    def _drawn(self, seed: int, step: int) -> AbstractContextManager[None]:
        """Random numbers that depend on seed and step only, so that all runs share them."""
        if self.settings.dropout == "off" and self._reason is None:
            return nullcontext()
        return seeded(1_000_003 * seed + step)

    def _reached(self) -> tuple[list[str], list[str]]:
        """Names of the trainable parameters that gradients reach, and of the others."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        rows = torch.arange(min(PROBE, len(self.data)))
        batch = gathered(self.data, rows, next(iter(named.values())).device)
        with torch.enable_grad(), seeded(0):
            loss = self.task.losses(self.model, batch).sum()
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        pairs = list(zip(named, found, strict=True))
        return [k for k, g in pairs if g is not None], [k for k, g in pairs if g is None]

    def _why_not(self, data: Data | None) -> str | None:
        """Why the models cannot be stacked; None when they can."""
        if data is None:
            return "the dataset is not made of tensors"
        rows = torch.arange(min(PROBE, len(data))).expand(2, -1)
        weights = torch.full(rows.shape, 1 / rows.shape[1], dtype=torch.float64)
        try:
            with seeded(0):
                self._stack(2).set_gradients(self._gradients, data, rows, weights)
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        return None

    def _require_finite(self, losses: Tensor, runs: Sequence[int], seed: int, step: int) -> None:
        if bool(torch.isfinite(losses).all()):
            return
        run = runs[int(torch.nonzero(~torch.isfinite(losses))[0, 0])]
        group = self.data.ids[self.removals.groups[run].numpy()].tolist()
        without = f"without {', '.join(map(str, group[:5]))}" if group else "on everything"
        raise NonFiniteError(
            f"the loss is NaN or infinite in the run {without}, seed {seed}, step {step}: lower "
            "learning_rate"
        )


def steps_at(amount: float, per_epoch: int) -> int:
    """Steps after `amount` epochs, at least one."""
    return max(1, round(amount * per_epoch))


def doubled(data: Data) -> Data:
    """The same data with all real numbers in double precision."""
    if data.columns is not None:
        return Data(map_tensors(_double, data.columns), ids=data.ids)
    collate = data.collate
    return Data(
        data.dataset, ids=data.ids, collate=lambda items: map_tensors(_double, collate(items))
    )


@torch.no_grad()
def require_finite_losses(task: Task, model: nn.Module, data: Data) -> None:
    """Raise `NonFiniteError` with the ids of examples whose loss is NaN or infinite."""
    device = next(model.parameters()).device
    for rows, batch in data.batches(512):
        with naming(data, rows):
            moved = map_tensors(lambda t: t.to(device), batch)
            require_finite(task.losses(model, moved), "loss")


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
