"""`torch.nn.Linear` and transformers' `Conv1D`, which is a linear layer stored transposed."""

import torch
from torch import Tensor, nn

from forebear.layers.rule import Factors


class LinearRule:
    """`y = x Wᵀ + b`; the gradient is `Σ_t g_t a_tᵀ`."""

    def factors(self, layer: nn.Module, a: Tensor, g: Tensor, *, bias: bool = False) -> Factors:
        """`left` are output gradients `[b, t, o]`, `right` are inputs `[b, t, i]`."""
        size = len(g)
        right = a.reshape(size, -1, a.shape[-1])
        if bias:
            right = torch.cat([right, right.new_ones(*right.shape[:2], 1)], 2)
        return Factors(g.reshape(size, -1, g.shape[-1]), right)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """`[o, i]` as it is."""
        return weight

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """`[o, i]` as it is."""
        return matrix


class TransposedLinearRule(LinearRule):
    """`y = x W + b` with `W` `[i, o]`, as in GPT-2."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        """`[i, o]` to `[o, i]`."""
        return weight.T

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """`[o, i]` to `[i, o]`."""
        return matrix.T


def rule(layer: nn.Module) -> LinearRule:
    """The rule for a linear layer, told apart by how its weight is stored."""
    return LinearRule() if hasattr(layer, "in_features") else TransposedLinearRule()
