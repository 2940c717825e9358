"""Losses of linear models in closed form: pure functions of model outputs `z` and targets `y`.

Each supplies the loss, its first two derivatives in the outputs, the third one contracted twice
with a direction, and how fast the second can change: what Newton steps and their bounds need.
Outputs are `[..., n, c]`; targets `[n, c]`, or labels `[n]` for the softmax.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Family(Protocol):
    """A loss of outputs and targets with its derivatives."""

    @property
    def name(self) -> str:
        """For people and for records."""
        ...

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """Loss of each example, `[..., n]`."""
        ...

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        """First derivative, `[..., n, c]`."""
        ...

    def curvature(self, z: Tensor) -> Tensor:
        """Second derivative, `[..., n, c, c]`."""
        ...

    def third(self, z: Tensor, direction: Tensor) -> Tensor:
        """Third derivative contracted twice with a direction in the outputs, `[..., n, c]`."""
        ...

    def contrasts(self, outputs: int) -> Tensor:
        """Directions `[a, c]` whose largest move s bounds the change of curvature by `exp(±s)`."""
        ...


@dataclass(frozen=True)
class Squared:
    """Half the squared error, summed over outputs."""

    name: str = "squared"

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """`½ ‖z − y‖²`."""
        return 0.5 * (z - y).square().sum(-1)

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        """`z − y`."""
        return z - y

    def curvature(self, z: Tensor) -> Tensor:
        """The identity."""
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        return eye.expand(*z.shape, z.shape[-1])

    def third(self, z: Tensor, direction: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(direction)

    def contrasts(self, outputs: int) -> Tensor:
        """None: the curvature never changes."""
        return torch.zeros(0, outputs, dtype=torch.float64)


@dataclass(frozen=True)
class Logistic:
    """Cross-entropy of one logit against labels 0 and 1, `[n, 1]`."""

    name: str = "logistic"

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """`log(1 + exp(z)) − y z`."""
        return (F.softplus(z) - y * z).sum(-1)

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        """`p − y`."""
        return z.sigmoid() - y

    def curvature(self, z: Tensor) -> Tensor:
        """`p (1 − p)`."""
        return (z.sigmoid() * (-z).sigmoid())[..., None]

    def third(self, z: Tensor, direction: Tensor) -> Tensor:
        """`p (1 − p) (1 − 2p) u²`."""
        p, rest = z.sigmoid(), (-z).sigmoid()
        return p * rest * (rest - p) * direction.square()

    def contrasts(self, outputs: int) -> Tensor:
        """The logit itself: `|φ'''| ≤ φ''`."""
        return torch.ones(1, 1, dtype=torch.float64)


@dataclass(frozen=True)
class Softmax:
    """Cross-entropy of c logits against labels `[n]`."""

    name: str = "softmax"

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        """`log Σ exp(z) − z_y`."""
        return z.logsumexp(-1) - z.gather(-1, _labels(z, y)).squeeze(-1)

    def residual(self, z: Tensor, y: Tensor) -> Tensor:
        """`p − e_y`."""
        return z.softmax(-1).scatter_add(-1, _labels(z, y), -torch.ones_like(z[..., :1]))

    def curvature(self, z: Tensor) -> Tensor:
        """`diag p − p pᵀ`."""
        p = z.softmax(-1)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]

    def third(self, z: Tensor, direction: Tensor) -> Tensor:
        """`p ∘ ((u − ū)² − Var u)` with mean and variance under p."""
        p = z.softmax(-1)
        squares = (direction - (p * direction).sum(-1, keepdim=True)).square()
        return p * (squares - (p * squares).sum(-1, keepdim=True))

    def contrasts(self, outputs: int) -> Tensor:
        """Differences of two logits: the third derivative is at most their range."""
        pairs = torch.combinations(torch.arange(outputs), 2)
        eye = torch.eye(outputs, dtype=torch.float64)
        return eye[pairs[:, 0]] - eye[pairs[:, 1]]


def _labels(z: Tensor, y: Tensor) -> Tensor:
    return y[:, None].expand(*z.shape[:-1], 1)
