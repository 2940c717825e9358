"""Many small trainings as one: parameters of all members stacked, every step made for all at once.

The members' losses are computed by `vmap` over stacked parameters. The gradient of their sum with
respect to the stack holds every member's own gradient, for members share nothing. The optimizers
are elementwise, so torch's own update of the stack is that of each member.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from forebear.data import Data, batch_length, map_tensors
from forebear.errors import DataError, ForebearWarning, TaskError
from forebear.progress import track
from forebear.task import Loss, per_example
from forebear.training import schedule
from forebear.training.recipe import Recipe, diverged, seeded
from forebear.training.subsets import subset_masks

State = dict[str, Tensor]

CHUNK = 50
"""Members trained together: enough to hide the overhead of a step, few enough for the cache."""

WORKSPACE = 2**28
"""Entries of the stacked parameters, gradients and optimizer state of a chunk (1 GB of float32)."""

TRACE_AFTER = 40
"""Steps of one shape before it is traced: a trace costs as much as some hundred small steps."""

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
        states = [_state(model) for model in models]
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
        wrapped = _Call(self.template, function)
        columns = []
        for _, batch in data.batches(batch_size):
            batch = map_tensors(lambda t: t.to(device), batch)
            columns.append(self._evaluate_batch(wrapped, batch))
        return torch.cat(columns, 1)

    @torch.no_grad()
    def _evaluate_batch(self, wrapped: "_Call", batch: Any) -> Tensor:
        size = batch_length(batch)
        chunk = max(1, EVALUATION // size)
        try:
            parts = [
                vmap(wrapped.at, in_dims=(0, None))(_rows(self.state, start, chunk), batch)
                for start in range(0, len(self), chunk)
            ]
            values = torch.cat(parts)
        except RuntimeError as error:
            _warn_of_loop("evaluated", str(error))
            values = torch.stack([wrapped.function(m, batch) for m in self.models()])
        per_example(values[0], size, "the measurement")
        return values


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
    stackable = _stackable_data(data)
    reason = _why_not(recipe, stackable, starts[each[0]])
    if reason is not None or stackable is None:
        _warn_of_loop("trained", reason or "")
        pairs = track(zip(masks, each, strict=True), "retraining models", total=len(masks))
        return Ensemble.of([recipe.train(data, mask, seed) for mask, seed in pairs])
    template = starts[each[0]]
    state = {
        name: torch.empty((len(masks), *value.shape), dtype=value.dtype, device=value.device)
        for name, value in _state(template).items()
    }
    chunks = list(_chunks(masks, recipe, template))
    gradients = _Gradients(template, recipe.loss)

    def epochs() -> Iterator[None]:
        for members in chunks:
            chunk = _Chunk(recipe, stackable, masks[members], [each[i] for i in members], starts)
            yield from chunk.train(gradients)
            for name, value in chunk.state.items():
                state[name][members] = value.detach()

    for _ in track(epochs(), "retraining models", total=len(chunks) * recipe.epochs):
        pass
    _require_finite(state, each)
    return Ensemble(copy.deepcopy(template).eval(), state)


class _Call(nn.Module):
    """`function(model, batch)` as a module call, so that the model's parameters can be swapped."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Tensor:
        return self.function(self.model, batch)

    def at(self, state: State, batch: Any) -> Tensor:
        """The values with the parameters and buffers of `state`."""
        return functional_call(self, {f"model.{k}": v for k, v in state.items()}, (batch,))


class _Gradients:
    """Gradients of the weighted loss of each member; traced for a shape that comes often.

    The trace is the plain list of tensor operations. It saves the overhead of `vmap`, of swapping
    parameters and of autograd at every step, a third of the time for small models.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._call = _Call(model, loss)
        self._steps: Counter[tuple[int, ...]] = Counter()
        self._traces: dict[tuple[int, ...], Callable[..., State]] = {}

    def __call__(self, parameters: State, buffers: State, batch: Any, weights: Tensor) -> State:
        """Gradients by name, each `[m, *shape]`.

        Args:
            parameters: `[m, *shape]` by name.
            buffers: `[m, *shape]` by name.
            batch: tensors `[m, width, ...]`.
            weights: `[m, width]`, by which the losses of a member are summed.
        """
        arguments = (parameters, buffers, batch, weights)
        shape = tuple(weights.shape)
        self._steps[shape] += 1
        if self._steps[shape] <= TRACE_AFTER:
            return self.untraced(*arguments)
        if shape not in self._traces:
            self._traces[shape] = self._trace(arguments)
        return self._traces[shape](*arguments)

    def untraced(self, parameters: State, buffers: State, batch: Any, weights: Tensor) -> State:
        """The same by `vmap`."""
        return vmap(grad(self._loss))(parameters, buffers, batch, weights)

    def _loss(self, parameters: State, buffers: State, batch: Any, weights: Tensor) -> Tensor:
        losses = self._call.at(parameters | buffers, batch)
        return (per_example(losses, len(weights), "the loss") * weights).sum()

    def _trace(self, arguments: tuple[Any, ...]) -> Callable[..., State]:
        from torch.fx.experimental import proxy_tensor  # slow to import, so only when used

        def plain(parameters: State, buffers: State, batch: Any, weights: Tensor) -> State:
            return self.untraced(parameters, buffers, batch, weights)

        try:
            return proxy_tensor.make_fx(plain)(*arguments)
        except Exception:  # whatever a trace cannot do, vmap may still do
            return self.untraced


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
        needs = {name for name, p in template.named_parameters() if p.requires_grad}
        own = {seed: _state(starts[seed]) for seed in dict.fromkeys(seeds)}
        self.state = {
            name: torch.stack([own[seed][name] for seed in seeds]) for name in _state(template)
        }
        self.parameters = {name: self.state[name] for name in self.state if name in needs}
        self.buffers = {name: self.state[name] for name in self.state if name not in needs}
        steps = schedule.steps_per_epoch(int(masks[0].sum()), recipe.batch_size)
        self.batches = schedule.StackedBatches(masks, steps)
        self._first = next(iter(self.parameters.values()))

    def train(self, gradients: Callable[..., State]) -> Iterator[None]:
        """Run all epochs; yields after each."""
        optimizer = self._optimizer()
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
                optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * factor
                self._set_gradients(gradients, rows[step], self.batches.weights[step])
                optimizer.step()
            yield

    def probe(self, gradients: Callable[..., State]) -> None:
        """The gradients of one step, to see whether the model can be stacked."""
        orders = [next(schedule.epoch_orders(len(self.data), 1, seed)) for seed in self.seeds]
        rows = self.batches.epoch(torch.stack(orders))[0]
        self._set_gradients(gradients, rows, self.batches.weights[0])

    def _set_gradients(
        self, gradients: Callable[..., State], rows: Tensor, weights: Tensor
    ) -> None:
        device = self._first.device
        flat = self.data.batch(rows.reshape(-1))
        batch = map_tensors(lambda t: t.to(device).unflatten(0, rows.shape), flat)
        named = gradients(self.parameters, self.buffers, batch, weights.to(self._first))
        for name, parameter in self.parameters.items():
            # Fused optimizers read a gradient in memory order, and some come transposed.
            parameter.grad = named[name].contiguous()

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = list(self.parameters.values())
        try:
            return self.recipe.make_optimizer(parameters, fused=True)
        except RuntimeError:  # no fused kernel for this device or type
            return self.recipe.make_optimizer(parameters)


def _chunks(masks: Tensor, recipe: Recipe, template: nn.Module) -> Iterator[list[int]]:
    """Positions of members that are trained together: those with the same number of steps."""
    size = sum(p.numel() for p in template.parameters())
    most = max(1, min(CHUNK, WORKSPACE // (4 * max(size, 1))))
    groups: dict[int, list[int]] = {}
    for member, count in enumerate(masks.sum(1).tolist()):
        steps = schedule.steps_per_epoch(count, recipe.batch_size)
        groups.setdefault(steps, []).append(member)
    for members in groups.values():
        parts = -(-len(members) // most)
        for part in range(parts):  # chunks of even size: a small rest would waste its overhead
            yield members[len(members) * part // parts : len(members) * (part + 1) // parts]


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
        chunk.probe(_Gradients(trial, recipe.loss).untraced)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def _stackable_data(data: Data) -> Data | None:
    """The dataset as tensors; None where examples are collated in a way of their own."""
    if data.columns is not None:
        return data
    if isinstance(data.dataset, list) and data.collate is torch.utils.data.default_collate:
        try:
            return Data(tuple(data.batch(slice(0, len(data)))), ids=data.ids)
        except (RuntimeError, TypeError, DataError):  # examples of different shapes
            return None
    return None


def _state(model: nn.Module) -> State:
    """Parameters (a tied one once) and buffers by name, detached."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: value.detach() for name, value in named.items()}


def _rows(state: State, start: int, count: int) -> State:
    return {name: value[start : start + count] for name, value in state.items()}


def _require_finite(state: State, seeds: list[int]) -> None:
    bad: set[int] = set()
    for value in state.values():
        if value.is_floating_point():
            finite = torch.isfinite(value.reshape(len(value), -1)).all(1)
            bad.update(torch.nonzero(~finite)[:, 0].tolist())
    if bad:
        raise diverged([seeds[i] for i in bad], f"{len(bad)} of {len(seeds)} models")


def _warn_of_loop(what: str, reason: str) -> None:
    warnings.warn(
        f"models are {what} one at a time, which is slower: {reason.partition(chr(10))[0]}",
        ForebearWarning,
        stacklevel=4,
    )
