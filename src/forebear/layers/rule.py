"""The two shapes a layer's gradient can have."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Factors(NamedTuple):
    """Gradient of a weight matrix, kept factored: `Σ_t left_t ⊗ right_t`.

    A gradient that is zero because its layer was not reached has `t = 0`.

    Attributes:
        left: `[b, t, rows]`, or `[b, t]` integers that stand for one-hot rows.
        right: `[b, t, cols]`.
    """

    left: Tensor
    right: Tensor


def vector(gradient: Tensor) -> Factors:
    """A gradient `[b, p]` that is written out, as the only column of a matrix.

    The right factor is a one that takes no memory; `is_one` recognises it.
    """
    return Factors(gradient[:, None], gradient.new_ones(1, 1, 1).expand(len(gradient), 1, 1))


def is_one(right: Tensor) -> bool:
    """Whether a right factor is the one of `vector`, by which nothing needs to be multiplied."""
    shared = right.shape[1:] == (1, 1) and right.stride(0) == 0 and len(right) > 1
    return shared and right[0].item() == 1


def written_out(matrices: Tensor) -> Factors:
    """Gradients `[b, rows, cols]` that are written out: each row beside its one-hot left factor."""
    rows = torch.arange(matrices.shape[1], device=matrices.device)
    return Factors(rows.expand(len(matrices), -1), matrices)


def is_written(factors: Factors, rows: int) -> bool:
    """Whether factors are those of `written_out`, whose right one is the gradient itself."""
    left, right = factors
    if left.is_floating_point() or right.shape[1] != rows or not len(left):
        return False
    shared = left.stride(0) == 0 or len(left) == 1
    return shared and torch.equal(left[0], torch.arange(rows, device=left.device))


class MatrixRule(Protocol):
    """A layer that multiplies by a matrix: its gradient is a sum of outer products."""

    def factors(self, layer: nn.Module, a: Tensor, g: Tensor, *, bias: bool = False) -> Factors:
        """Factors of the gradient of `layer.weight`; the bias gradient is the sum of `left`.

        Args:
            layer: the layer that was called.
            a: what went in, examples first.
            g: gradient of the summed loss at what came out.
            bias: whether `right` ends with a column of ones, so that the bias is one more input.
        """
        ...

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight `[...]` as a matrix `[rows, cols]`."""
        ...

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """A matrix `[rows, cols]` in the shape of `weight`."""
        ...


class VectorRule(Protocol):
    """A layer whose per-example gradients are cheap to write out."""

    def gradients(self, layer: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Gradient of each example's loss, `name -> [b, *shape]`.

        The names are `weight` and `bias`, where the layer has them; other parameters of the layer
        are left to the general fallback.
        """
        ...
