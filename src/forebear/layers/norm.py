"""Normalisation layers: `y = x̂ · weight + bias` with the normalised input x̂ recomputed.

Their gradients are `Σ g x̂` and `Σ g` over the positions of an example, no larger than one
activation, and are written out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class NormRule:
    """A layer that normalises, scales and shifts.

    Attributes:
        normalised: `(layer, a) -> x̂`, in the shape of `a`.
        channels: the parameters belong to dimension 1 (`[b, c, ...]`) and not to the last ones.
    """

    normalised: Callable[[Any, Tensor], Tensor]
    channels: bool

    def gradients(self, layer: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Gradients `[b, *shape]` of those of `weight` and `bias` that exist."""
        grads: dict[str, Tensor] = {}
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if isinstance(weight, Tensor):
            grads["weight"] = self._summed(g * self.normalised(layer, a), weight)
        if isinstance(bias, Tensor):
            grads["bias"] = self._summed(g, bias)
        return grads

    def _summed(self, x: Tensor, parameter: Tensor) -> Tensor:
        """Sum over the positions of each example."""
        if self.channels:
            return x.flatten(2).sum(2) if x.ndim > 2 else x
        positions = x.ndim - 1 - parameter.ndim
        return x.flatten(1, positions).sum(1) if positions > 0 else x


def rule(layer: nn.Module) -> NormRule | None:
    """The rule of a normalisation layer; None where it is a kind that this file does not know."""
    if not isinstance(getattr(layer, "weight", None), Tensor):
        return None
    if isinstance(layer, nn.GroupNorm):
        return NormRule(_group, channels=True)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        # Without running statistics a batch is normalised by itself, which mixes its examples.
        return NormRule(_batch, channels=True) if layer.running_mean is not None else None
    if isinstance(layer, nn.LayerNorm):
        return NormRule(_layer, channels=False)
    if isinstance(layer, nn.RMSNorm):
        return NormRule(_torch_rms, channels=False)
    return NormRule(_rms, channels=False) if _epsilon(layer) is not None else None


def _layer(layer: nn.LayerNorm, a: Tensor) -> Tensor:
    return F.layer_norm(a, layer.normalized_shape, eps=layer.eps)


def _group(layer: nn.GroupNorm, a: Tensor) -> Tensor:
    return F.group_norm(a, layer.num_groups, eps=layer.eps)


def _batch(layer: nn.modules.batchnorm._BatchNorm, a: Tensor) -> Tensor:
    mean, variance = layer.running_mean, layer.running_var
    assert mean is not None  # `rule` has seen them
    assert variance is not None
    return F.batch_norm(a, mean.to(a.dtype), variance.to(a.dtype), eps=layer.eps)


def _torch_rms(layer: nn.RMSNorm, a: Tensor) -> Tensor:
    return F.rms_norm(a, tuple(layer.normalized_shape), eps=layer.eps)


def _rms(layer: nn.Module, a: Tensor) -> Tensor:
    # Llama, Qwen, T5, Gemma: the last dimension, whatever they call the small number.
    epsilon: Any = _epsilon(layer)
    return a * torch.rsqrt(a.square().mean(-1, keepdim=True) + epsilon)


def _epsilon(layer: Any) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if isinstance(getattr(layer, name, None), float | int):
            return getattr(layer, name)
    return None
