"""Many small trainings as one: the members of an ensemble are stacked and trained together."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from forebear.data import Data, batch_length, map_tensors
from forebear.errors import DataError, TaskError
from forebear.progress import track
from forebear.task import Loss, per_example
from forebear.training import schedule
from forebear.training.recipe import Recipe, diverged, seeded, stamped
from forebear.training.stacked import (
    Call,
    Gradients,
    Stack,
    State,
    chunks,
    gathered,
    rows_of,
    stackable_data,
    state_of,
    warn_of_loop,
)
from forebear.training.subsets import subset_masks

EVALUATION = 2**15
"""Member-example pairs evaluated at a time."""


@dataclass(frozen=True)
class Ensemble:
    """Trained models of one architecture, stacked.

    Attributes:
        template: a model of that architecture in evaluation mode; its own weights mean nothing.
        state: parameters and buffers by name, each `[m, *shape]`.
    """

    template: nn.Module
    state: State

    def __len__(self) -> int:
        return len(next(iter(self.state.values())))

    @classmethod
    def of(cls, models: Iterable[nn.Module]) -> "Ensemble":
        """Stack models that were trained one at a time."""
        models = list(models)
        if not models:
            raise DataError("an ensemble needs at least one model")
        states = [state_of(model) for model in models]
        if len({tuple((k, v.shape) for k, v in state.items()) for state in states}) > 1:
            raise TaskError("the models differ in their parameters: they cannot be stacked")
        stacked = {name: torch.stack([s[name] for s in states]) for name in states[0]}
        return cls(copy.deepcopy(models[0]).eval(), stacked)

    def model(self, member: int) -> nn.Module:
        """One member as a module of its own, in evaluation mode."""
        model = copy.deepcopy(self.template).eval()
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():
            for name, value in self.state.items():
                own[name].copy_(value[member])
        return model

    def models(self) -> Iterator[nn.Module]:
        """The members in order."""
        return (self.model(member) for member in range(len(self)))

    def evaluate(self, function: Loss, data: Any, *, batch_size: int = 512) -> Tensor:
        """`function(model, batch) -> [b]` of every member on every example, `[m, n]`."""
        data = Data.of(data)
        device = next(iter(self.state.values())).device
        wrapped = Call(self.template, function)
        columns = []
        for _, batch in data.batches(batch_size):
            batch = map_tensors(lambda t: t.to(device), batch)
            columns.append(self._evaluate_batch(wrapped, batch))
        return torch.cat(columns, 1)

    @torch.no_grad()
    def evaluate_own(self, function: Loss, data: Any) -> Tensor:
        """`function` of each member on the example of its own position alone, `[m]`."""
        data = Data.of(data)
        if len(data) != len(self):
            raise DataError(f"{len(data)} examples for {len(self)} models: give one each")
        columns = stackable_data(data)
        device = next(iter(self.state.values())).device
        if columns is not None:
            rows = torch.arange(len(self))[:, None]
            wrapped = Call(self.template, function)
            try:
                return vmap(wrapped.at)(self.state, gathered(columns, rows, device))[:, 0]
            except RuntimeError as error:
                warn_of_loop("evaluated", str(error))
        single = (data.slice(slice(i, i + 1)) for i in range(len(data)))
        pairs = zip(self.models(), single, strict=True)
        return torch.cat([evaluate_model(model, function, part) for model, part in pairs])

    @torch.no_grad()
    def _evaluate_batch(self, wrapped: Call, batch: Any) -> Tensor:
        size = batch_length(batch)
        chunk = max(1, EVALUATION // size)
        try:
            parts = [
                vmap(wrapped.at, in_dims=(0, None))(rows_of(self.state, start, chunk), batch)
                for start in range(0, len(self), chunk)
            ]
            values = torch.cat(parts)
        except RuntimeError as error:
            warn_of_loop("evaluated", str(error))
            values = torch.stack([wrapped.function(m, batch) for m in self.models()])
        per_example(values[0], size, "the measurement")
        return values


@torch.no_grad()
def evaluate_model(model: nn.Module, function: Loss, data: Data) -> Tensor:
    """`function(model, batch) -> [b]` of one model on every example, `[n]`, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for _, batch in data.batches(512):
        moved = map_tensors(lambda t: t.to(device), batch)
        parts.append(per_example(function(model, moved), batch_length(moved), "the measurement"))
    return torch.cat(parts)


def train_ensemble(
    recipe: Recipe, data: Data, subsets: Any, seeds: int | Sequence[int]
) -> Ensemble:
    """The members of `recipe.train_many`.

    A model that cannot be stacked is trained in a loop, after a warning with the reason.

    Raises:
        NonFiniteError: a training diverged.
    """
    masks = subset_masks(subsets, len(data))
    each = [seeds] * len(masks) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if len(each) != len(masks):
        raise DataError(f"{len(each)} seeds were given for {len(masks)} subsets: give one each")
    starts: dict[int, nn.Module] = {}
    for seed in dict.fromkeys(each):
        with seeded(seed):
            starts[seed] = recipe.build().train()
    stackable = stackable_data(data)
    reason = _why_not(recipe, stackable, starts[each[0]])
    if reason is not None or stackable is None:
        warn_of_loop("trained", reason or "")
        pairs = track(zip(masks, each, strict=True), "retraining models", total=len(masks))
        return Ensemble.of([recipe.train(data, mask, seed) for mask, seed in pairs])
    template = starts[each[0]]
    state = {
        name: torch.empty((len(masks), *value.shape), dtype=value.dtype, device=value.device)
        for name, value in state_of(template).items()
    }
    size = sum(p.numel() for p in template.parameters())
    steps = [schedule.steps_per_epoch(c, recipe.batch_size) for c in masks.sum(1).tolist()]
    parts = list(chunks(steps, size))
    gradients = Gradients(template, recipe.loss)

    def epochs() -> Iterator[None]:
        for members in parts:
            chunk = _Chunk(recipe, stackable, masks[members], [each[i] for i in members], starts)
            yield from chunk.train(gradients)
            for name, value in chunk.stack.state.items():
                state[name][members] = value.detach()

    for _ in track(epochs(), "retraining models", total=len(parts) * recipe.epochs):
        pass
    _require_finite(state, each)
    return Ensemble(copy.deepcopy(template).eval(), state)


class _Chunk:
    """Members with the same number of steps, trained together."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        masks: Tensor,
        seeds: list[int],
        starts: dict[int, nn.Module],
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.seeds = seeds
        template = starts[seeds[0]]
        own = {seed: state_of(starts[seed]) for seed in dict.fromkeys(seeds)}
        state = {
            name: torch.stack([own[seed][name] for seed in seeds]) for name in state_of(template)
        }
        trained = [name for name, p in template.named_parameters() if p.requires_grad]
        self.stack = Stack(state, trained, recipe.make_optimizer)
        steps = schedule.steps_per_epoch(int(masks[0].sum()), recipe.batch_size)
        self.batches = schedule.StackedBatches(masks, steps)

    def train(self, gradients: Gradients) -> Iterator[None]:
        """Run all epochs; yields after each."""
        steps = self.batches.steps
        total = steps * self.recipe.epochs
        n = len(self.data)
        distinct = list(dict.fromkeys(self.seeds))
        which = torch.tensor([distinct.index(seed) for seed in self.seeds])
        streams = [schedule.epoch_orders(n, self.recipe.epochs, seed) for seed in distinct]
        for epoch, orders in enumerate(zip(*streams, strict=True)):
            rows = self.batches.epoch(torch.stack(orders)[which])
            for step in range(steps):
                factor = schedule.rate_factor(self.recipe.schedule, epoch * steps + step, total)
                self.stack.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * factor
                stamp = self.stamp(epoch)
                self.stack.step(gradients, self.data, rows[step], self.batches.weights[step], stamp)
            yield

    def probe(self, gradients: Gradients) -> None:
        """The gradients of one step, to see whether the model can be stacked."""
        orders = [next(schedule.epoch_orders(len(self.data), 1, seed)) for seed in self.seeds]
        rows = self.batches.epoch(torch.stack(orders))[0]
        weights = self.batches.weights[0]
        self.stack.set_gradients(gradients, self.data, rows, weights, self.stamp(0))

    def stamp(self, epoch: int) -> Callable[[Any], Any]:
        """What marks the examples of a batch `[m, width]` with the moment of their visit."""
        seeds = torch.tensor(self.seeds)[:, None]
        return lambda batch: stamped(batch, self.recipe.loss, seeds, epoch)


def _why_not(recipe: Recipe, data: Data | None, model: nn.Module) -> str | None:
    """Why the members cannot be stacked; None when they can."""
    if data is None:
        return "the dataset is not made of tensors"
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{type(module).__name__} draws random numbers for each model"
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{type(module).__name__} mixes the examples of a batch"
    masks = torch.ones(2, len(data), dtype=torch.bool)
    trial = copy.deepcopy(model)
    try:
        chunk = _Chunk(recipe, data, masks, [0, 0], {0: trial})
        chunk.probe(Gradients(trial, recipe.loss))
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def _require_finite(state: State, seeds: list[int]) -> None:
    bad: set[int] = set()
    for value in state.values():
        if value.is_floating_point():
            finite = torch.isfinite(value.reshape(len(value), -1)).all(1)
            bad.update(torch.nonzero(~finite)[:, 0].tolist())
    if bad:
        raise diverged([seeds[i] for i in bad], f"{len(bad)} of {len(seeds)} models")
