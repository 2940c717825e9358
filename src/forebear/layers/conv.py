"""`torch.nn.Conv1d` and `Conv2d`: a linear layer applied to every patch of its input."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from forebear.layers.rule import Factors


class ConvRule:
    """A convolution without groups: `Σ_t g_t p_tᵀ` over output positions t with patches p.

    The form is that of Grosse & Martens, "A Kronecker-factored approximate Fisher matrix for
    convolution layers" (2016), section 3.
    """

    def factors(self, layer: nn.Module, a: Tensor, g: Tensor) -> Factors:
        """`left` are output gradients `[b, t, o]`, `right` are patches `[b, t, i * k]`."""
        return Factors(g.flatten(2).mT, _patches(layer, a).mT)

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
        g = g.flatten(2)  # [b, o, t]
        patches = _patches(layer, a).reshape(size * groups, -1, g.shape[2])
        weight = g.reshape(size * groups, -1, g.shape[2]) @ patches.mT
        grads = {"weight": weight.reshape(size, *convolution.weight.shape)}
        if convolution.bias is not None:
            grads["bias"] = g.sum(2)
        return grads


def rule(layer: nn.Module) -> ConvRule | GroupedConvRule:
    """The rule for a convolution, by whether it has groups."""
    return ConvRule() if layer.groups == 1 else GroupedConvRule()


def _patches(layer: Any, a: Tensor) -> Tensor:
    """Inputs under the kernel at each output position, `[b, i * k, t]`."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    padding = _padding(layer)
    if layer.padding_mode != "zeros" or any(low != high for low, high in padding):
        sides = [side for pair in reversed(padding) for side in pair]  # F.pad counts from the last
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        a = F.pad(a, sides, mode=mode)
        padding = [(0, 0)] * len(kernel)
    if not any(low for low, _ in padding) and set(kernel) == {1} and set(stride) == {1}:
        return a.flatten(2)
    margins = [low for low, _ in padding]
    if len(kernel) == 1:  # a picture one pixel high
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
        a, margins = a[:, :, None], [0, *margins]
    return F.unfold(a, kernel, dilation=dilation, padding=margins, stride=stride)


def _padding(layer: Any) -> list[tuple[int, int]]:
    """Padding before and after, by spatial dimension."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(side, side) for side in layer.padding]
