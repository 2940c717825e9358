"""What the estimators need of a model at its optimum: residuals, curvature, Jacobians.

Everything here is in the sum convention: `L(θ) = Σ_i ℓ_i(θ) + ½ θᵀΛθ`, `H = Σ_i H_i + Λ`, with
`g_i = J_iᵀ r_i` and `H_i = J_iᵀ V_i J_i`. The penalty Λ is never removed. The library's mean
convention is `C + λI = H / n`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from forebear.curvature.dense import cholesky_factor
from forebear.errors import DataError, TaskError

WORKSPACE = 2**24
"""Entries of the largest temporary (128 MB of float64)."""


class Problem(Protocol):
    """A fitted model as a sum of per-example losses and a quadratic penalty."""

    @property
    def ids(self) -> np.ndarray:
        """One a training example, `[n]`."""
        ...

    @property
    def size(self) -> int:
        """Number of parameters P."""
        ...

    @property
    def residuals(self) -> Tensor:
        """First derivative of each loss in the outputs, weights included, `[n, c]`."""
        ...

    @property
    def curvatures(self) -> Tensor:
        """Second derivative, weights included, `[n, c, c]`."""
        ...

    def hessian(self) -> Tensor:
        """H, `[P, P]`; directions that nothing depends on may have any positive curvature."""
        ...

    def penalty_matrix(self) -> Tensor:
        """The part of H that does not shrink with the data, `[P, P]`."""
        ...

    def jacobian(self, rows: Tensor) -> Tensor:
        """`J_i` of examples `[u]`, `[u, c, P]`."""
        ...

    def pull(self, rows: Tensor, cotangents: Tensor) -> Tensor:
        """`Σ_k J_iᵀ v_i` for `v` `[m, k, c]` of the examples `[m, k]`, `[m, P]`."""
        ...

    def gradient(self) -> Tensor:
        """`∇L(θ̂)`, `[P]`: zero at an optimum."""
        ...


@dataclass(frozen=True)
class Factorised:
    """`H = LLᵀ`, factorised once for every estimator and every removed set."""

    problem: Problem

    @cached_property
    def hessian(self) -> Tensor:
        """H, `[P, P]`."""
        return self.problem.hessian().double()

    @cached_property
    def factor(self) -> Tensor:
        """Lower factor of H."""
        factor = cholesky_factor(self.hessian.clone())
        if factor is None or not _has_pivots(factor, self.hessian):
            raise TaskError(_not_positive(self.hessian, "the Hessian"))
        return factor

    def solve(self, rows: Tensor) -> Tensor:
        """`H⁻¹` applied to each row of `[..., P]`."""
        flat = rows.reshape(-1, rows.shape[-1])
        return torch.cholesky_solve(flat.T, self.factor).T.reshape(rows.shape)

    @cached_property
    def kernels(self) -> Tensor:
        """`K_i = J_i H⁻¹ J_iᵀ`, `[n, c, c]`: how far example i reaches into its own outputs."""
        return kernels(self.problem, self.factor, torch.arange(len(self.problem.ids)))

    @cached_property
    def leverages(self) -> Tensor:
        """`tr(H⁻¹ H_i)`, `[n]`; they add up to `tr(H⁻¹ Σ_i H_i)`, which is P without a penalty."""
        return (self.problem.curvatures * self.kernels).sum((1, 2))


def kernels(problem: Problem, factor: Tensor, rows: Tensor) -> Tensor:
    """`J_i (LLᵀ)⁻¹ J_iᵀ` of examples `[u]`, `[u, c, c]`."""
    outputs = problem.residuals.shape[1]
    step = max(1, WORKSPACE // (2 * outputs * problem.size))
    out = problem.residuals.new_empty(len(rows), outputs, outputs)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        jacobian = problem.jacobian(rows[part])
        half = torch.linalg.solve_triangular(
            factor, jacobian.reshape(-1, problem.size).T, upper=False
        )
        half = half.T.view_as(jacobian)
        out[part] = half @ half.mT
    return out


def as_sets(groups: Tensor, size: int) -> Tensor:
    """Removed sets `[m, k]` of positions, checked.

    Raises:
        DataError: a set is empty, is everything, has duplicates or positions out of range.
    """
    groups = groups[None] if groups.ndim == 1 else groups
    if groups.ndim != 2 or groups.is_floating_point() or groups.dtype == torch.bool:
        raise DataError(
            f"removed sets are {groups.dtype} of shape {tuple(groups.shape)}: give positions [m, k]"
        )
    k = groups.shape[1]
    if k == 0:
        raise DataError("a removed set is empty: name at least one example")
    if k >= size:
        raise DataError(f"a removed set has {k} of {size} examples: something must be left")
    if groups.numel() and (groups.min() < 0 or groups.max() >= size):
        wrong = groups[(groups < 0) | (groups >= size)][0].item()
        raise DataError(f"position {wrong} is out of range: there are {size} training examples")
    ordered = groups.sort(1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any():
        raise DataError(f"position {ordered[:, 1:][twice][0].item()} stands twice in a removed set")
    return groups


def _has_pivots(factor: Tensor, matrix: Tensor) -> bool:
    """Whether no pivot is rounding only: a factor of a singular matrix can exist."""
    return bool((factor.diagonal().square() > 1e-13 * matrix.diagonal()).all())


def _not_positive(matrix: Tensor, what: str) -> str:
    lowest = torch.linalg.eigvalsh(matrix)[0].item()
    return (
        f"{what} is not positive definite: its smallest eigenvalue is {lowest:.3g}; add a penalty "
        "or damping, or leave out columns that others determine"
    )
