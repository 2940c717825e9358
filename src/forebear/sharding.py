"""Models whose parameters are spread over processes: FSDP2, `torch.distributed.fsdp.fully_shard`.

Between passes a process holds its part of every parameter; a pass gathers whole layers one after
the other, and lets go of each. Gathering is something that all processes of the group do together,
so all must make the same passes in the same order. Two rules follow for the rest of forebear: a
pass is announced by `in_step`, so that processes with work of different lengths stay together, and
after the pass `to_shards` puts back what torch leaves whole for a backward pass to come.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from forebear.errors import TaskError

Result = TypeVar("Result")


class Rounds(Protocol):
    """Passes that processes make together, each over its own examples."""

    def step(self, kind: str, compute: Callable[[], Result], again: Callable[[], object]) -> Result:
        """Compute when the others make a pass of the same kind; see `in_step`."""
        ...

    def agreement(self) -> AbstractContextManager[None]:
        """A block that ends for all processes or, when it fails in one, fails in all."""
        ...


_rounds: ContextVar[Rounds | None] = ContextVar("forebear_rounds", default=None)


@contextmanager
def together(rounds: Rounds) -> Iterator[None]:
    """Inside the block, passes of sharded models are made in these rounds."""
    token = _rounds.set(rounds)
    try:
        yield
    finally:
        _rounds.reset(token)


def in_step(
    model: nn.Module, kind: str, compute: Callable[[], Result], again: Callable[[], object]
) -> Result:
    """Make a pass, together with other processes where the model is sharded.

    Args:
        model: whose pass it is.
        kind: passes of one kind gather the same parameters in the same order.
        compute: makes the pass.
        again: makes it once more for nothing, for others that have more to do.
    """
    rounds = _rounds.get()
    if rounds is None or not is_sharded(model):
        return compute()

    def from_shards(make: Callable[[], Any]) -> Any:
        # What is whole already would not be gathered, and others may have to gather it.
        to_shards(model)
        return make()

    return rounds.step(kind, partial(from_shards, compute), partial(from_shards, again))


def agreement(model: nn.Module) -> AbstractContextManager[None]:
    """The part of a pass that may fail for one process alone, before what needs all of them."""
    rounds = _rounds.get()
    if rounds is None or not is_sharded(model):
        return nullcontext()
    return rounds.agreement()


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of the model are spread over processes."""
    modules = _sharded_modules(model)
    return bool(modules) or any(is_shard(p) for p in model.parameters())


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is this process's part of a larger one."""
    return hasattr(tensor, "full_tensor")  # DTensor, whose import takes a second


def require_whole(model: nn.Module) -> None:
    """Raise `TaskError` for a sharded model, whose parameters are in no graph of autograd's."""
    if is_sharded(model):
        raise TaskError(
            "the model is sharded over processes (FSDP), and this method copies it or "
            "differentiates by whole parameters: use one that reads gradients layer by layer, "
            "such as ekfac, trak or graddot"
        )


def whole(tensor: Any) -> Tensor:
    """The tensor with the parts of all processes, which all must ask for."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def to_shards(model: nn.Module) -> None:
    """Give back the parameters that a pass has gathered and not released.

    After a forward pass without a backward one torch keeps the outermost parameters whole.
    """
    for module in _sharded_modules(model):
        module.reshard()


def spread(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors as the parts that this process holds of those called the same in `like`."""
    return {name: _part(value, like.get(name)) for name, value in state.items()}


def shards_of_gradients(value: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """Autograd's gradient of a scalar that all processes computed alike, as shards.

    What torch averages over processes is then the gradient itself. Gradients that the parameters
    had stay what they were.
    """
    before = [p.grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(value)
        return tuple(torch.zeros_like(p.detach()) if p.grad is None else p.grad for p in parameters)
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def _part(value: Tensor, like: Any) -> Tensor:
    if like is None or not is_shard(like) or is_shard(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    # Every process has the whole tensor and takes its part: nothing is sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _sharded_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]
