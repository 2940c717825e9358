"""Conjugate gradients for `(C + λI) x = v`, all right-hand sides together.

Hestenes & Stiefel (1952); for influence functions Koh & Liang (2017). Every iteration is one
product of the curvature with a vector for each right-hand side that has not converged yet.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from forebear.curvature.base import GradientStream
from forebear.curvature.damping import Damping
from forebear.curvature.operator import Kind
from forebear.curvature.solvers import (
    Implicit,
    Solution,
    System,
    fit_system,
    restore_system,
)
from forebear.differentiation import Function
from forebear.errors import DataError, NumericalWarning, TaskError
from forebear.types import require_choices

PROGRESS = 0.5  # a restart from the residual formed anew must at least halve it


@dataclass(frozen=True, kw_only=True)
class ConjugateGradients:
    """C by its products, `(C + λI)⁻¹` by conjugate gradients.

    Attributes:
        kind: of the curvature.
        tolerance: relative residual at which a query has converged.
        iterations: most for each query.
        preconditioner: `"ekfac"` solves with EK-FAC at the same λ in every iteration, which takes
            fewer of them.
    """

    kind: Kind = "gauss_newton"
    tolerance: float = 1e-5
    iterations: int = 300
    preconditioner: Literal["none", "ekfac"] = "none"

    def __post_init__(self) -> None:
        require_choices(self)
        if not self.tolerance >= 0 or self.iterations < 1:
            raise DataError(
                f"tolerance is {self.tolerance} and iterations {self.iterations}: the tolerance "
                "must not be negative and there must be one iteration"
            )

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> "FittedConjugateGradients":
        """Keep the rows of C where they fit, and fit the preconditioner; nothing is inverted.

        Raises:
            TaskError: the loss does not have the derivatives that `kind` asks for.
        """
        system = fit_system(self.kind, self.preconditioner, stream, function, damping, seed)
        return FittedConjugateGradients(system, configuration=self)

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> "FittedConjugateGradients":
        """From the saved λ and preconditioner, and a pass over the data."""
        system = restore_system(self.kind, self.preconditioner, stream, function, tensors)
        return FittedConjugateGradients(system, configuration=self)


@dataclass(frozen=True)
class FittedConjugateGradients(Implicit):
    """Solves queries when they come."""

    configuration: ConjugateGradients = ConjugateGradients()

    def find(self, rows: Tensor) -> Solution:
        """Solve for each row of `[m, P]`.

        Raises:
            TaskError: the curvature is negative along a direction that was met.
        """
        settings = self.configuration
        solution = conjugate_gradients(
            self.system, rows, tolerance=settings.tolerance, iterations=settings.iterations
        )
        self._warn(solution, len(rows))
        return solution

    def _warn(self, solution: Solution, solves: int) -> None:
        settings = self.configuration
        worst = solution.residuals.max().item() if solves else 0.0
        type_ = solution.rows.dtype
        rounded = solution.iterations < settings.iterations  # no further step made it smaller
        reached = max(settings.tolerance, torch.finfo(type_).eps ** 0.5 if rounded else 0.0)
        if worst <= reached:
            return
        remedy = "allow more iterations, raise the damping, or use ekfac_cg"
        if rounded:
            remedy = f"rounding to {str(type_).removeprefix('torch.')} allows no better: raise the "
            remedy += "damping, or use a model in float64"
        warnings.warn(
            f"{int((solution.residuals > reached).sum())} of {solves} solves by conjugate "
            f"gradients did not reach the tolerance {settings.tolerance:.3g} in "
            f"{solution.iterations} iterations: the worst relative residual is {worst:.3g}; "
            f"{remedy}",
            NumericalWarning,
            stacklevel=7,
        )

    def with_damping(self, damping: Damping) -> "FittedConjugateGradients":
        """The same curvature with another λ: nothing is computed again but a mean eigenvalue."""
        return FittedConjugateGradients(
            self.system.with_damping(damping), configuration=self.configuration
        )


def conjugate_gradients(
    system: System, rows: Tensor, *, tolerance: float = 1e-5, iterations: int = 300
) -> Solution:
    """`A⁻¹ v` for each row v of `[m, P]`, A symmetric and positive definite.

    The recursion's own residual drifts away from the true one in single precision. So when it says
    that all have converged the residual is formed anew, and rows that were let go too early start
    again from there.

    Raises:
        TaskError: A is not positive definite.
    """
    solved = torch.zeros_like(rows)
    norms = rows.norm(dim=1)
    goals = tolerance * norms
    left = torch.nonzero(norms > 0)[:, 0]  # positions that have not converged
    missing, before = rows, norms  # residual vectors and lengths
    used = 0
    while len(left) and used < iterations:
        steps, correction = _recursion(system, missing[left], goals[left], iterations - used)
        solved[left] += correction
        used += steps
        missing = rows - system.apply(solved)
        now = missing.norm(dim=1)
        left = torch.nonzero((now > goals) & (now < PROGRESS * before))[:, 0]
        before = now
    residuals = torch.where(norms > 0, before / norms.clamp_min(1e-300), 0.0)
    return Solution(solved, residuals, used)


@dataclass
class _Pursuit:
    """The vectors of the recursion for the right-hand sides that are still going."""

    where: Tensor  # their positions
    residual: Tensor
    direction: Tensor
    product: Tensor  # residual times preconditioned residual, [m]
    goals: Tensor

    def only(self, going: Tensor) -> "_Pursuit":
        """Some of them."""
        return replace(self, **{name: value[going] for name, value in vars(self).items()})


def _recursion(system: System, rows: Tensor, goals: Tensor, iterations: int) -> tuple[int, Tensor]:
    """Iterations used, and solutions `[m, P]` whose recursive residuals are below the goals."""
    solved = torch.zeros_like(rows)
    first = system.precondition(rows)
    everyone = torch.arange(len(rows), device=rows.device)
    state = _Pursuit(everyone, rows.clone(), first.clone(), (rows * first).sum(1), goals)
    for step in range(iterations):
        ahead = system.apply(state.direction)
        curvature = (state.direction * ahead).sum(1)
        _require_positive(system, state.direction, curvature)
        length = (state.product / curvature)[:, None]
        solved.index_add_(0, state.where, length * state.direction)
        state.residual -= length * ahead
        going = state.residual.norm(dim=1) > state.goals
        if not going.any():
            return step + 1, solved
        if not going.all():
            state = state.only(going)
        better = system.precondition(state.residual)
        product = (state.residual * better).sum(1)
        state.direction = state.direction * (product / state.product)[:, None] + better
        state.product = product
    return iterations, solved


def _require_positive(system: System, directions: Tensor, curvature: Tensor) -> None:
    if (curvature > 0).all():
        return
    if not torch.isfinite(curvature).all():
        raise TaskError(
            f"conjugate gradients overflow with damping λ = {system.damping:.3g}: raise the "
            "damping, or use a model in float64"
        )
    quotient = (curvature / directions.square().sum(1)).min().item() - system.damping
    other = "" if system.kind == "gauss_newton" else ", or use curvature='gauss_newton'"
    raise TaskError(
        f"the {system.kind} has a direction of curvature {quotient:.3g}, so its smallest "
        f"eigenvalue is at most that, and damping λ = {system.damping:.3g} does not cover it: use "
        f"damping=fb.Absolute(...) well above {abs(quotient):.3g}{other}"
    )
