"""Slow and plain ways to the same numbers. Nothing here comes from the code under test."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def rows(batch: Any, index: Any) -> Any:
    """Some examples of a tuple or dict of tensors; None puts an axis of one in front."""
    if isinstance(batch, dict):
        return {key: value[index] for key, value in batch.items()}
    return tuple(value[index] for value in batch)


def length(batch: Any) -> int:
    return len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])


def gradients_one_at_a_time(model: nn.Module, loss: Loss, batch: Any) -> dict[str, Tensor]:
    """`[b, *shape]` by one backward pass for each example alone, in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    parameters = trainable(model)
    collected: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(length(batch)):
        value = loss(model, rows(batch, slice(i, i + 1))).sum()
        grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            collected[name].append(torch.zeros_like(parameter) if grad is None else grad)
    for module, mode in modes.items():
        module.training = mode
    return {name: torch.stack(grads) for name, grads in collected.items()}


def gradients_by_vmap(model: nn.Module, loss: Loss, batch: Any) -> dict[str, Tensor]:
    """`[b, *shape]` by `vmap(grad)` of the whole model."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> Tensor:
            return loss(self.model, batch)

    whole = Whole()
    parameters = {f"model.{name}": p.detach() for name, p in trainable(model).items()}

    def value(parameters: dict[str, Tensor], example: Any) -> Tensor:
        one = rows(example, None)
        return torch.func.functional_call(whole, parameters, (one,)).sum()

    grads = torch.func.vmap(torch.func.grad(value), (None, 0))(parameters, batch)
    return {name.removeprefix("model."): grad for name, grad in grads.items()}


def layer_gradients_by_vmap(layer: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """`[b, *shape]` for one layer: gradient of `⟨g, layer(a)⟩` for each example."""
    parameters = {name: p.detach() for name, p in trainable(layer).items()}

    def value(parameters: dict[str, Tensor], a: Tensor, g: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, parameters, (a[None],)) * g[None]).sum()

    return torch.func.vmap(torch.func.grad(value), (None, 0, 0))(parameters, a, g)


def layer_gradients_one_at_a_time(layer: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The same by one backward pass for each example."""

    def loss(layer: nn.Module, batch: Any) -> Tensor:
        return (layer(batch[0]) * batch[1]).flatten(1).sum(1)

    return gradients_one_at_a_time(layer, loss, (a, g))


def written_out(left: Tensor, right: Tensor, size: int) -> Tensor:
    """Factors as a matrix `[b, rows, cols]`, position by position; `size` rows if one-hot."""
    if not left.is_floating_point():
        left = torch.eye(size, dtype=right.dtype)[left]
    total = torch.zeros(len(left), size, right.shape[2], dtype=right.dtype)
    for example in range(len(left)):
        for position in range(left.shape[1]):
            total[example] += torch.outer(left[example, position], right[example, position])
    return total
