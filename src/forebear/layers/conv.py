"""`torch.nn.Conv1d`, `Conv2d`, `Conv3d`: a linear layer applied to every patch of its input."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forebear.layers.rule import Factors


class ConvRule:
    """A convolution without groups: `Σ_t g_t p_tᵀ` over output positions t with patches p.

    The form is that of Grosse & Martens, "A Kronecker-factored approximate Fisher matrix for
    convolution layers" (2016), section 3.
    """

    def factors(self, layer: nn.Module, a: Tensor, g: Tensor, *, bias: bool = False) -> Factors:
        """`left` are output gradients `[b, t, o]`, `right` are patches `[b, t, i * k]`."""
        return Factors(g.flatten(2).mT, _patches(layer, a, g.shape[2:], bias=bias).mT)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """`[o, i, *kernel]` to `[o, i * k]`."""
        return weight.reshape(len(weight), -1)

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """`[o, i * k]` to `[o, i, *kernel]`."""
        return matrix.reshape(weight.shape)


class GroupedConvRule:
    """A convolution with groups: each group has its own small matrix, so gradients are written out.

    A depthwise convolution has few weights and many positions; factors would be larger than the
    gradient.
    """

    def gradients(self, layer: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Gradients of `weight` `[b, o, i / groups, *kernel]` and, if there is one, `bias`."""
        convolution: Any = layer
        groups, size = convolution.groups, len(g)
        patches = _patches(layer, a, g.shape[2:])
        g = g.flatten(2)  # [b, o, t]
        patches = patches.reshape(size * groups, -1, g.shape[2])
        weight = g.reshape(size * groups, -1, g.shape[2]) @ patches.mT
        grads = {"weight": weight.reshape(size, *convolution.weight.shape)}
        if convolution.bias is not None:
            grads["bias"] = g.sum(2)
        return grads


def rule(layer: nn.Module) -> ConvRule | GroupedConvRule:
    """The rule for a convolution, by whether it has groups."""
    return ConvRule() if layer.groups == 1 else GroupedConvRule()


def _patches(layer: Any, a: Tensor, positions: torch.Size, *, bias: bool = False) -> Tensor:
    """Inputs under the kernel at each output position, `[b, i * k, t]`; a row of ones for a bias.

    One strided copy: several times faster than `F.unfold`, and the row of ones costs nothing.
    """
    kernel, size, channels = layer.kernel_size, *a.shape[:2]
    padding = _padding(layer)
    if any(side for pair in padding for side in pair):
        sides = [side for pair in reversed(padding) for side in pair]  # F.pad counts from the last
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        a = F.pad(a, sides, mode=mode)
    elif not bias and set(kernel) == set(layer.stride) == {1}:
        return a.flatten(2)
    steps = a.stride()[2:]
    window = a.as_strided(
        (size, channels, *kernel, *positions),
        (
            *a.stride()[:2],
            *(step * d for step, d in zip(steps, layer.dilation, strict=True)),
            *(step * s for step, s in zip(steps, layer.stride, strict=True)),
        ),
    )  # [b, i, *kernel, *positions], overlapping views of the input
    rows = channels * math.prod(kernel)
    patches = a.new_empty(size, rows + bias, math.prod(positions))
    patches[:, :rows].unflatten(1, (channels, *kernel)).unflatten(-1, positions).copy_(window)
    if bias:
        patches[:, rows] = 1
    return patches


def _padding(layer: Any) -> list[tuple[int, int]]:
    """Padding before and after, by spatial dimension."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(side, side) for side in layer.padding]
