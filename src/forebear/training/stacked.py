"""Models of one architecture stacked, and steps of training made for all of them at once.

The members' losses are computed by `vmap` over stacked parameters. The gradient of their sum with
respect to the stack holds every member's own gradient, for members share nothing. The optimizers
are elementwise, so torch's own update of the stack is that of each member.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from forebear.data import Data, map_tensors, naming
from forebear.errors import DataError, ForebearWarning
from forebear.task import Loss, per_example

State = dict[str, Tensor]
"""Parameters and buffers by name; of a stack each has the member as its first axis."""

CHUNK = 50
"""Members trained together: enough to hide the overhead of a step, few enough for the cache."""

WORKSPACE = 2**28
"""Entries of the stacked parameters, gradients and optimizer state of a chunk (1 GB of float32)."""

TRACE_AFTER = 40
"""Steps of one shape before it is traced: a trace costs as much as some hundred small steps."""


class Call(nn.Module):
    """`function(model, batch)` as a module call, so that the model's parameters can be swapped."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Tensor:
        """The values with the model's own parameters."""
        return self.function(self.model, batch)

    def at(self, state: State, batch: Any) -> Tensor:
        """The values with the parameters and buffers of `state`."""
        return functional_call(self, {f"model.{k}": v for k, v in state.items()}, (batch,))


class Gradients:
    """Gradients of the weighted loss of each member; traced for a shape that comes often.

    The trace is the plain list of tensor operations. It saves the overhead of `vmap`, of swapping
    parameters and of autograd at every step, a third of the time for small models.

    Args:
        model: the architecture, in the mode in which it is trained.
        loss: `loss(model, batch) -> [b]`.
        randomness: `"same"` lets the loss draw random numbers, the same for all members.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, *, randomness: Literal["error", "same"] = "error"
    ) -> None:
        self._call = Call(model, loss)
        self._randomness = randomness
        self._steps: Counter[tuple[int, ...]] = Counter()
        self._traces: dict[tuple[int, ...], Callable[..., tuple[State, Tensor]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A trace is made again sooner than it is sent to another process.
        return {**self.__dict__, "_steps": Counter(), "_traces": {}}

    def __call__(
        self, parameters: State, buffers: State, batch: Any, weights: Tensor, *, shared: bool
    ) -> tuple[State, Tensor]:
        """Gradients by name, each `[m, *shape]`, and the weighted losses `[m]`.

        Args:
            parameters: `[m, *shape]` by name.
            buffers: `[m, *shape]` by name.
            batch: tensors `[m, width, ...]`, or `[width, ...]` when they are shared.
            weights: `[m, width]`, by which the losses of a member are summed.
            shared: whether all members see the same batch.
        """
        arguments = (parameters, buffers, batch, weights)
        shape = (*weights.shape, int(shared))
        self._steps[shape] += 1
        if self._steps[shape] <= TRACE_AFTER or self._randomness == "same":
            return self.untraced(*arguments, shared=shared)
        if shape not in self._traces:
            self._traces[shape] = self._trace(arguments, shared)
        return self._traces[shape](*arguments)

    def untraced(
        self, parameters: State, buffers: State, batch: Any, weights: Tensor, *, shared: bool
    ) -> tuple[State, Tensor]:
        """The same by `vmap`."""
        axes = (0, 0, None if shared else 0, 0)
        each = vmap(grad_and_value(self._loss), in_dims=axes, randomness=self._randomness)
        return each(parameters, buffers, batch, weights)

    def _loss(self, parameters: State, buffers: State, batch: Any, weights: Tensor) -> Tensor:
        losses = self._call.at(parameters | buffers, batch)
        return (per_example(losses, len(weights), "the loss") * weights).sum()

    def _trace(
        self, arguments: tuple[Any, ...], shared: bool
    ) -> Callable[..., tuple[State, Tensor]]:
        from torch.fx.experimental import proxy_tensor  # slow to import, so only when used

        def plain(
            parameters: State, buffers: State, batch: Any, weights: Tensor
        ) -> tuple[State, Tensor]:
            return self.untraced(parameters, buffers, batch, weights, shared=shared)

        try:
            return proxy_tensor.make_fx(plain)(*arguments)
        except Exception:  # whatever a trace cannot do, vmap may still do
            return plain


class Stack:
    """Members that are trained together.

    Attributes:
        state: parameters and buffers, each `[m, *shape]`, updated in place.

    Args:
        state: where the members start.
        trained: names of the parameters that steps change.
        make_optimizer: makes a torch optimizer of a list of tensors.
        clip: largest norm of a member's gradient; None for any.
    """

    def __init__(
        self,
        state: State,
        trained: Iterable[str],
        make_optimizer: Callable[..., torch.optim.Optimizer],
        *,
        clip: float | None = None,
    ) -> None:
        self.state = state
        self.parameters = {name: state[name] for name in trained}
        self.buffers = {name: v for name, v in state.items() if name not in self.parameters}
        self.clip = clip
        self._first = next(iter(self.parameters.values()))
        tensors = list(self.parameters.values())
        try:
            self.optimizer = make_optimizer(tensors, fused=True)
        except RuntimeError:  # no fused kernel for this device or type
            self.optimizer = make_optimizer(tensors)

    def step(
        self,
        gradients: Callable[..., tuple[State, Tensor]],
        data: Data,
        rows: Tensor,
        weights: Tensor,
        stamp: Callable[[Any], Any] | None = None,
    ) -> Tensor:
        """One step of all members; the weighted losses `[m]` before it.

        Args:
            gradients: a `Gradients`.
            data: made of tensors.
            rows: positions `[m, width]`, or `[width]` where members share them.
            weights: `[m, width]`.
            stamp: what is done to the batch before the loss sees it.
        """
        losses = self.set_gradients(gradients, data, rows, weights, stamp)
        self.optimizer.step()
        return losses

    def set_gradients(
        self,
        gradients: Callable[..., tuple[State, Tensor]],
        data: Data,
        rows: Tensor,
        weights: Tensor,
        stamp: Callable[[Any], Any] | None = None,
    ) -> Tensor:
        """The gradients of one step, without making it."""
        batch = gathered(data, rows, self._first.device)
        if stamp is not None:
            with naming(data, rows.reshape(-1)):
                batch = stamp(batch)
        weights = weights.to(self._first)
        named, losses = gradients(
            self.parameters, self.buffers, batch, weights, shared=rows.ndim == 1
        )
        factor = None if self.clip is None else _clipping(named, self.clip)
        for name, parameter in self.parameters.items():
            value = named[name]
            if factor is not None:
                value = value * factor.reshape(-1, *[1] * (value.ndim - 1))
            # Fused optimizers read a gradient in memory order, and some come transposed.
            parameter.grad = value.contiguous()
        return losses.detach()


def gathered(data: Data, rows: Tensor, device: torch.device) -> Any:
    """The examples at `rows`, shaped as `rows` are."""

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device)
        return tensor if rows.ndim == 1 else tensor.unflatten(0, rows.shape)

    return map_tensors(moved, data.batch(rows.reshape(-1)))


def state_of(model: nn.Module) -> State:
    """Parameters (a tied one once) and buffers by name, detached."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: value.detach() for name, value in named.items()}


def repeated(state: State, count: int) -> State:
    """`count` copies of one state, stacked."""
    return {name: torch.stack([value] * count) for name, value in state.items()}


def rows_of(state: State, start: int, count: int) -> State:
    """Members `start` to `start + count` of a stack."""
    return {name: value[start : start + count] for name, value in state.items()}


def joined(states: list[State]) -> State:
    """Stacks one after the other."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


def chunks(kinds: Iterable[Any], size: int) -> Iterator[list[int]]:
    """Positions of members that are trained together: those of one kind.

    Args:
        kinds: of each member, such as its number of steps.
        size: parameters of a member.
    """
    most = max(1, min(CHUNK, WORKSPACE // (4 * max(size, 1))))
    groups: dict[Any, list[int]] = {}
    for member, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(member)
    for members in groups.values():
        parts = -(-len(members) // most)
        for part in range(parts):  # chunks of even size: a small rest would waste its overhead
            yield members[len(members) * part // parts : len(members) * (part + 1) // parts]


def stackable_data(data: Data) -> Data | None:
    """The dataset as tensors; None where examples are collated in a way of their own."""
    if data.columns is not None:
        return data
    if isinstance(data.dataset, list) and data.collate is torch.utils.data.default_collate:
        try:
            return Data(tuple(data.batch(slice(0, len(data)))), ids=data.ids)
        except (RuntimeError, TypeError, DataError):  # examples of different shapes
            return None
    return None


def warn_of_loop(what: str, reason: str) -> None:
    """Say that models cannot be stacked, and why."""
    warnings.warn(
        f"models are {what} one at a time, which is slower: {reason.partition(chr(10))[0]}",
        ForebearWarning,
        stacklevel=4,
    )


def _clipping(gradients: State, most: float) -> Tensor:
    """By what each member's gradient is multiplied, `[m]`, as `clip_grad_norm_` does."""
    squares = [g.flatten(1).square().sum(1) for g in gradients.values()]
    return (most / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1.0)
