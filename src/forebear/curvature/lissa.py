"""LiSSA and its kin: `(C + λI)⁻¹ v` as a Neumann series, all right-hand sides together.

Agarwal, Bullins & Hazan (2017); for influence functions Koh & Liang (2017). With the answer written
as `y = x / s` the recursion `x ← v + (I − A/s) x` is `y ← y + (v − A y) / s`, from `y = v / s`.
What is added, times s, is the residual of the answer so far, so convergence is seen at no cost.
With EK-FAC P between, `y ← y + P⁻¹ (v − A y) / s`, it is the iteration of ASTRA (Wang et al. 2025),
which begins where EK-FAC ends.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from forebear.curvature.base import GradientStream
from forebear.curvature.damping import Damping
from forebear.curvature.operator import Kind, largest_eigenvalue, power_iteration
from forebear.curvature.solvers import (
    Implicit,
    Linear,
    Solution,
    System,
    fit_system,
    restore_system,
)
from forebear.differentiation import Function
from forebear.errors import DataError, NumericalWarning, TaskError
from forebear.types import require_choices

ABOVE = 1.1  # the scale over the largest eigenvalue, which power iteration finds from below
STEP = 1.5  # the preconditioned step times the largest eigenvalue; below 2 it converges
LARGE_RESIDUAL = 0.01
GROWTH = 1e6  # of an answer over what converging ones have


@dataclass(frozen=True, kw_only=True)
class LiSSA:
    """C by its products, `(C + λI)⁻¹` by a Neumann series.

    Attributes:
        kind: of the curvature.
        depth: most updates.
        scale: s, which must be above half the largest eigenvalue of C + λI; None finds it.
        batch: examples drawn for each update, as published; None takes all of them.
        repeats: independent runs over drawn examples whose answers are averaged.
        tolerance: relative residual at which a query has converged, where all examples are used.
        preconditioner: `"ekfac"` makes it the iteration of ASTRA; s is then that of the
            preconditioned curvature, at least 1.
    """

    kind: Kind = "gauss_newton"
    depth: int = 1000
    scale: float | None = None
    batch: int | None = None
    repeats: int = 1
    tolerance: float = 1e-5
    preconditioner: Literal["none", "ekfac"] = "none"

    def __post_init__(self) -> None:
        require_choices(self)
        counts = {"depth": self.depth, "repeats": self.repeats, "batch": self.batch}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise DataError(f"{name} of LiSSA is {value}: it must be at least 1")
        if self.scale is not None and not self.scale > 0:
            raise DataError(f"scale of LiSSA is {self.scale}: it must be above zero")
        if not self.tolerance >= 0:
            raise DataError(f"tolerance of LiSSA is {self.tolerance}: it must not be negative")

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> "FittedLiSSA":
        """Find the scale, and fit the preconditioner; nothing is inverted.

        Raises:
            TaskError: the loss does not have the derivatives that `kind` asks for.
        """
        by_example = self.batch is not None
        system = fit_system(
            self.kind, self.preconditioner, stream, function, damping, seed, by_example=by_example
        )
        return self._fitted(system, self._scale(system, seed), len(stream.data), seed)

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> "FittedLiSSA":
        """From the saved λ, scale and preconditioner, and a pass over the data."""
        by_example = self.batch is not None
        system = restore_system(
            self.kind, self.preconditioner, stream, function, tensors, by_example=by_example
        )
        scale, seed = tensors["scale"].item(), int(tensors["seed"].item())
        return self._fitted(system, scale, len(stream.data), seed)

    def _fitted(self, system: System, scale: float, examples: int, seed: int) -> "FittedLiSSA":
        return FittedLiSSA(system, configuration=self, scale=scale, examples=examples, seed=seed)

    def _scale(self, system: System, seed: int) -> float:
        if self.scale is not None:
            return self.scale
        if system.preconditioner is None:
            return ABOVE * power_iteration(system.operator, seed=seed) + system.damping
        return max(1.0, _largest(system, seed) / STEP)


@dataclass(frozen=True)
class FittedLiSSA(Implicit):
    """Solves queries when they come."""

    configuration: LiSSA = LiSSA()
    scale: float = 1.0
    examples: int = 1
    seed: int = 0

    def find(self, rows: Tensor) -> Solution:
        """Solve for each row of `[m, P]`.

        Raises:
            TaskError: the series diverges.
        """
        settings = self.configuration
        size = settings.batch
        if size is None or size >= self.examples:
            solution = neumann(
                self.system,
                rows,
                scale=self.scale,
                depth=settings.depth,
                tolerance=settings.tolerance,
                diverged=self._diverged,
            )
        else:
            total = sum(self._run(rows, size, self.seed + i) for i in range(settings.repeats))
            assert isinstance(total, Tensor)
            solved = total / settings.repeats
            solution = Solution(solved, self.system.residuals(solved, rows), settings.depth)
        if len(rows) and solution.residuals.max() > max(LARGE_RESIDUAL, settings.tolerance):
            warnings.warn(
                f"LiSSA stopped after {solution.iterations} updates with a relative residual of "
                f"{solution.residuals.max().item():.3g}: raise depth, which damping of "
                f"{self.system.damping:.3g} and scale {self.scale:.3g} let converge in about "
                f"{self._updates():,}, or use cg, which needs far fewer products",
                NumericalWarning,
                stacklevel=6,
            )
        return solution

    def with_damping(self, damping: Damping) -> "FittedLiSSA":
        """The same curvature with another λ, and the scale found again."""
        system = self.system.with_damping(damping)
        settings = self.configuration
        scale = settings._scale(system, self.seed)
        return settings._fitted(system, scale, self.examples, self.seed)

    def tensors(self) -> dict[str, Tensor]:
        """λ, scale, seed and the preconditioner."""
        return super().tensors() | {
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "seed": torch.tensor(self.seed),
        }

    def details(self) -> dict[str, object]:
        """λ, the scale, and the worst relative residual."""
        return {**super().details(), "scale": self.scale}

    def _run(self, rows: Tensor, size: int, seed: int) -> Tensor:
        """One run over drawn examples, the same ones for all right-hand sides."""
        generator = torch.Generator().manual_seed(seed)
        solved = self.system.precondition(rows) / self.scale
        limit = GROWTH * solved.norm(dim=1).clamp_min(1e-300)
        for _ in range(self.configuration.depth):
            examples = torch.randperm(self.examples, generator=generator)[:size]
            missing = rows - self.system.on(examples)(solved)
            solved = solved + self.system.precondition(missing) / self.scale
            if not (solved.norm(dim=1) <= limit).all():
                self._diverged()
        return solved

    def _updates(self) -> int:
        slowest = self.scale / max(self.system.damping, 1e-12)
        return int(slowest * max(1.0, -torch.tensor(LARGE_RESIDUAL).log().item()))

    def _diverged(self) -> None:
        system = self.system
        largest = _largest(system, self.seed)
        if self.scale > 0.55 * largest:
            where = "of a drawn batch is above the scale" if self.configuration.batch else "is < 0"
            remedy = "raise scale, batch or the damping"
            if self.configuration.batch is None:
                remedy = "raise the damping, or use curvature='gauss_newton'"
            raise TaskError(
                f"LiSSA diverges although its scale {self.scale:.3g} covers the largest eigenvalue "
                f"{largest:.3g} of the damped {system.kind}: an eigenvalue {where}; {remedy}"
            )
        raise TaskError(
            f"LiSSA diverges: its scale is {self.scale:.3g} and the largest eigenvalue of the "
            f"damped {system.kind} is {largest:.3g}; use a scale above {largest:.3g}, or scale=None"
        )


def neumann(
    system: System,
    rows: Tensor,
    *,
    scale: float,
    depth: int,
    tolerance: float = 0.0,
    diverged: Callable[[], None],
) -> Solution:
    """`A⁻¹ v` for each row v of `[m, P]`, after at most `depth` updates of `P⁻¹ v / s`.

    Without preconditioner the answer after J updates is `[I − (I − A/s)^(J+1)] A⁻¹ v`. Converging
    series never have a longer residual than v, in the norm of the preconditioner: one that has is
    reported at once, by a call of `diverged`, which is to raise an error.
    """
    solved = system.precondition(rows) / scale
    norms = rows.norm(dim=1)
    first = scale * (rows * solved).sum(1)
    left = torch.nonzero(norms > 0)[:, 0]
    used = 0
    for _ in range(depth):
        if not len(left):
            break
        missing = rows[left] - system.apply(solved[left])
        better = system.precondition(missing)
        if not ((missing * better).sum(1) <= 1.01 * first[left]).all():
            diverged()
        going = missing.norm(dim=1) > tolerance * norms[left]
        left, better = left[going], better[going]
        if len(left):
            solved.index_add_(0, left, better, alpha=1 / scale)
            used += 1
    return Solution(solved, system.residuals(solved, rows), used)


def _largest(system: System, seed: int) -> float:
    """Largest eigenvalue of the preconditioned, damped curvature."""
    apply: Linear = system.apply
    if system.preconditioner is not None:
        apply = lambda v: system.precondition(system.apply(v))  # noqa: E731
    return largest_eigenvalue(apply, system.operator.like, system.operator.size, seed=seed)
