"""How far an estimate can be from the optimum without the removed examples.

`distance_bound` is proved, for linear models and any estimate; `laws` are rates with constants that
were measured, and no bound.

The bound. Let F be the objective without T, θ the estimate, H̃ = ∇²F(θ), ν = ‖∇F(θ)‖ in the norm of
H̃⁻¹, and δ the way from θ to the optimum with d = ‖δ‖ in the norm of H̃. Along δ the curvature of
a logistic loss falls by at most exp(−|move of the logit|) (of a softmax: the largest move of a
difference of two logits; of a square: not at all), so that `δᵀ∇²F(θ + tδ)δ ≥ exp(−tρd) d²` with ρ
the largest norm, in H̃⁻¹, of what moves a logit of a kept example. Integrated,
`ν ≥ (1 − exp(−ρd)) / ρ`, and so, where ρν < 1, `d ≤ −log(1 − ρν) / ρ`: which is ν itself to first
order, and exactly for a square. It needs no penalty and no constant of strong convexity (in the
manner of Bach 2010).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from forebear.errors import DataError
from forebear.removal.families import Softmax
from forebear.removal.models import LinearModel
from forebear.removal.problem import WORKSPACE

CONSTANTS = {"newton_step": 3.1, "influence": 3.0}
"""Of the laws, in the middle of what `forebear study removal` measures (signal ‖θ*‖ = 2)."""


@dataclass(frozen=True)
class Bound:
    """A proved bound on the error of an estimate, for each removed set.

    Attributes:
        distance: on the Euclidean distance of the parameters, `[m]`; infinite where it cannot tell.
        scaled: on the distance in the norm of H̃, `[m]`.
        factor: Cholesky factor of H̃ `[m, P, P]`, which turns `scaled` into bounds on outputs.
    """

    distance: Tensor
    scaled: Tensor
    factor: Tensor

    def of_linear(self, directions: Tensor) -> Tensor:
        """Bound on the error of `directions · θ`, for directions `[q, P]`, `[m, q]`."""
        half = torch.linalg.solve_triangular(self.factor, directions.T[None], upper=False)
        return self.scaled[:, None] * half.norm(dim=1)


def distance_bound(model: LinearModel, shift: Tensor, kept: Tensor) -> Bound:
    """The bound for estimates `θ̂ + shift` `[m, P]` of optima without the examples not `kept`.

    Args:
        model: at its optimum or not: the bound does not depend on it.
        shift: `[m, P]`.
        kept: one for kept examples and zero for removed ones, `[m, n]`.
    """
    n, p = model.features.shape
    step = max(1, WORKSPACE // (n * p * model.outputs + model.size**2))
    parts = [
        _bound(model, shift[start : start + step], kept[start : start + step])
        for start in range(0, len(shift), step)
    ]
    return Bound(
        torch.cat([part.distance for part in parts]),
        torch.cat([part.scaled for part in parts]),
        torch.cat([part.factor for part in parts]),
    )


def _bound(model: LinearModel, shift: Tensor, kept: Tensor) -> Bound:
    theta = model.parameters + shift.view(-1, *model.parameters.shape)
    hessian = model.hessian_at(model.curvatures_at(theta, kept))
    factor, failed = torch.linalg.cholesky_ex(hessian)
    gradient = model.gradients_at(theta, kept)
    # Of a failed factor nothing holds: it is replaced so that the rest of the batch goes on.
    identity = torch.eye(model.size, dtype=factor.dtype)
    factor = torch.where((failed > 0)[:, None, None], identity, factor)
    half = torch.linalg.solve_triangular(factor, gradient[..., None], upper=False)[..., 0]
    decrement = half.norm(dim=1)
    steepest = _steepest(model, factor, kept)
    used = steepest * decrement
    # −log(1 − x) / x, whose limit at zero is one.
    growth = torch.where(
        used > 1e-12, -torch.log1p(-used.clamp(1e-12, 1 - 1e-15)) / used.clamp_min(1e-12), 1.0
    )
    inside = (used < 1) & (failed == 0)
    scaled = torch.where(inside, decrement * growth, torch.inf)
    return Bound(_euclidean(model, theta, hessian, scaled), scaled, factor)


def _euclidean(model: LinearModel, theta: Tensor, hessian: Tensor, scaled: Tensor) -> Tensor:
    """From the norm of H̃ to the Euclidean one, `[m]`."""
    if not isinstance(model.family, Softmax):
        return scaled / torch.linalg.eigvalsh(hessian)[:, 0].clamp_min(0).sqrt()
    # Shifting all logits of a column alike changes no prediction. That part of the way is known:
    # a penalty makes it zero at the optimum. The rest has the curvature of differences of logits.
    p, c = model.parameters.shape
    shared = torch.kron(
        torch.eye(p, dtype=torch.float64), torch.full((c, c), 1 / c, dtype=torch.float64)
    )
    height = hessian.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    lowest = torch.linalg.eigvalsh(hessian + height * shared)[:, 0].clamp_min(0)
    common = theta.mean(2) * (model.penalty > 0)  # [m, p]
    return (scaled.square() / lowest + c * common.square().sum(1)).sqrt()


def _steepest(model: LinearModel, factor: Tensor, kept: Tensor) -> Tensor:
    """ρ: the largest `‖x_i ⊗ a‖` in H̃⁻¹ over kept examples and contrasts a, `[m]`."""
    contrasts = model.family.contrasts(model.outputs)
    largest = factor.new_zeros(len(factor))
    identity = torch.eye(model.features.shape[1], dtype=factor.dtype)
    used = kept * (model.weights > 0)
    for contrast in contrasts:
        columns = torch.kron(identity, contrast[:, None].to(factor.dtype))  # [P, p]
        half = torch.linalg.solve_triangular(
            factor, columns.expand(len(factor), -1, -1), upper=False
        )
        norms = (model.features @ half.mT).square().sum(2) * used  # [m, n]
        largest = torch.maximum(largest, norms.max(1).values.sqrt())
    return largest


def laws(n: int, d: int, k: int) -> dict[str, float]:
    """Typical errors of the parameters after removing k random of n examples in d dimensions.

    For logistic regression on standard normal features with a signal ‖θ*‖ near 2: the Newton step
    is off by about `kd / n²`, influence and the Newton step differ by about
    `(k + d) √(kd) / n²`, and the shift itself is about `√(kd) / n` (Rubinstein & Hopkins 2025). The
    constants are measured; with another signal or other features they are other ones.

    Raises:
        DataError: k is not from 1 to n − 1, or d is not positive.
    """
    if not 1 <= k < n or d < 1:
        raise DataError(f"n={n}, d={d}, k={k}: k must be from 1 to n − 1 and d at least 1")
    newton = CONSTANTS["newton_step"] * k * d / n**2
    gap = CONSTANTS["influence"] * (k + d) * math.sqrt(k * d) / n**2
    return {"newton_step": newton, "influence": newton + gap}
