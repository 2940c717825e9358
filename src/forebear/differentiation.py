"""Gradients without layer rules: of whole models, and of single examples where no rule is known."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from forebear.data import batch_length, map_tensors
from forebear.sharding import require_whole, to_shards

Function = Callable[[nn.Module, Any], Tensor]
"""`(model, batch) -> [b]`: what is differentiated."""

HALF = (torch.float16, torch.bfloat16)


def per_example_gradients(
    model: nn.Module, names: tuple[str, ...], function: Function, batch: Any
) -> dict[str, Tensor]:
    """Gradients `[b, *shape]` of `function` for parameters that no rule knows.

    Uses `vmap`, and one example at a time where the model does something `vmap` cannot.
    """
    with layer_by_layer_attention():
        try:
            grads = _vectorised(model, names, function, batch)
        except Exception:
            # vmap refuses in many ways (recurrent layers, branches on values, random numbers). A
            # true fault of the function shows again below, without functorch's frames around it.
            grads = _one_by_one(model, names, function, batch)
    # Other parameters may need gradients, and a graph over them would outlive the batch.
    return {name: at_least_float32(g.detach()) for name, g in grads.items()}


def _vectorised(
    model: nn.Module, names: tuple[str, ...], function: Function, batch: Any
) -> dict[str, Tensor]:
    wrapped = Wrapped(model, function)
    parameters = dict(model.named_parameters())
    chosen = {f"model.{name}": parameters[name].detach() for name in names}
    columns: list[Tensor] = []
    map_tensors(lambda t: columns.append(t) if t.ndim else None, batch)

    def value(chosen: dict[str, Tensor], *example: Tensor) -> Tensor:
        leaves = iter(example)
        one = map_tensors(lambda t: next(leaves)[None] if t.ndim else t, batch)
        return torch.func.functional_call(wrapped, chosen, (one,))[0]

    axes = (None, *(0 for _ in columns))
    # The fused attention kernels have no batching rule and would run one example at a time.
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.func.vmap(torch.func.grad(value), axes)(chosen, *columns)
    return {name.removeprefix("model."): g for name, g in grads.items()}


def _one_by_one(
    model: nn.Module, names: tuple[str, ...], function: Function, batch: Any
) -> dict[str, Tensor]:
    rows: list[tuple[Tensor, ...]] = []
    with torch.enable_grad(), only_these_need_gradients(model, names) as parameters:
        for i in range(batch_length(batch)):
            one = map_tensors(lambda t, i=i: t[i : i + 1] if t.ndim else t, batch)
            rows.append(dense_gradients(function(model, one)[0], parameters))
    return {name: torch.stack(g) for name, g in zip(names, zip(*rows, strict=True), strict=True)}


def dense_gradients(value: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """Autograd's gradient of a scalar; zeros for parameters that it does not depend on."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(p) for p in parameters)
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return tuple(
        torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
        for p, g in zip(parameters, grads, strict=True)
    )


class Wrapped(nn.Module):
    """Makes `function(model, batch)` a module call, so that its parameters can be swapped."""

    def __init__(self, model: nn.Module, function: Function) -> None:
        super().__init__()
        require_whole(model)
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Tensor:
        """The function's value."""
        return self.function(self.model, batch)


@contextmanager
def only_these_need_gradients(
    model: nn.Module, names: tuple[str, ...], *, shards: bool = False
) -> Iterator[list[Tensor]]:
    """Only the parameters called `names` require gradients inside the block.

    Args:
        model: whose parameters they are.
        names: may be none.
        shards: the caller knows what to do with parameters that are sharded over processes.

    Raises:
        TaskError: they are, and the caller does not.
    """
    if names and not shards:
        require_whole(model)
    to_shards(model)  # whole ones would be other parameters than those that follow
    before = {p: p.requires_grad for p in model.parameters()}
    named = dict(model.named_parameters()) if names else {}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        yield [named[name].requires_grad_(True) for name in names]
    finally:
        for parameter, needs in before.items():
            parameter.requires_grad_(needs)


@contextmanager
def layer_by_layer_attention() -> Iterator[None]:
    """Attention calls its layers inside the block, one by one."""
    # torch runs a whole encoder layer as one fused call when nothing in it needs a gradient, and
    # then no hook inside is called.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def at_least_float32(x: Tensor) -> Tensor:
    """In single precision what was in half."""
    return x.float() if x.dtype in HALF else x
