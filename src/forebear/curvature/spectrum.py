"""Inner products of a curvature that is known by its eigenvectors, all or the largest."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Gradients
from forebear.curvature.damping import (
    Damping,
    EffectiveDimension,
    NonzeroRelative,
    damped_inverse,
    damping_for,
)
from forebear.curvature.solved import Solved, flat
from forebear.errors import TaskError
from forebear.gradients import Precision

Rest = Literal["damped", "drop"]


@dataclass(frozen=True)
class Eigenpairs:
    """`C = V diag(h) Vᵀ`: all that does not depend on damping.

    Attributes:
        plan: blocks of the vectors.
        values: `[r]`, not negative.
        vectors: `[r, P]`, orthonormal rows.
        mean: mean eigenvalue of C itself, which may have more than are listed.
        examples: n.
        complete: whether everything else is zero, and not just unknown.
        rest: directions that are not listed count as `"damped"` by λ alone, or are `"drop"`ped.
        precision: of the products of all pairs.
        facts: for the record.
    """

    plan: Plan
    values: Tensor
    vectors: Tensor = field(repr=False)
    mean: float
    examples: int
    complete: bool
    rest: Rest = "damped"
    precision: Precision = "float32"
    facts: dict[str, Any] = field(default_factory=dict)

    def with_damping(self, damping: Damping) -> "FittedSpectrum":
        """Inverted.

        Raises:
            TaskError: λ is zero where C is, or the damping is a rule about unknown eigenvalues.
        """
        ruled = isinstance(damping, EffectiveDimension | NonzeroRelative)
        if ruled and not self.complete:
            damping.value(self.mean)  # says what to use instead
        value, inverse, base = inverted(
            self.values,
            self.mean,
            self.vectors.shape[1],
            self.examples,
            damping,
            drop=self.rest == "drop",
        )
        return FittedSpectrum(self, value, inverse, base)


def inverted(
    values: Tensor,
    mean: float,
    size: int,
    examples: int,
    damping: Damping,
    *,
    drop: bool = False,
) -> tuple[float, Tensor, float]:
    """λ, and the inverse `(C + λI)⁻¹` on eigenvectors `[r]` and on everything else.

    Args:
        values: eigenvalues `[r]`.
        mean: mean eigenvalue of C.
        size: P.
        examples: n.
        damping: what was asked for.
        drop: whether directions that are not listed are left out.

    Raises:
        TaskError: λ is zero where C is.
    """
    if isinstance(damping, EffectiveDimension | NonzeroRelative):
        value = damping_for(damping, values, examples, size)
    else:
        value = damping_for(damping, values.new_tensor([mean]), examples)
    spans = len(values) == size
    scale = values.max().item() if len(values) else mean
    lowest = values.min().item() if spans else 0.0
    dropped = drop and not spans
    if not dropped and not value + lowest > 1e-14 * (value + scale):
        raise TaskError(
            f"the curvature is singular with damping λ = {value:.3g}: it has {size} dimensions "
            f"and fewer independent gradients, its smallest eigenvalue is {lowest:.3g}; "
            "increase the damping"
        )
    inverse = damped_inverse(damping, value, values)
    base = 0.0
    if not spans and not dropped:
        base = damped_inverse(damping, value, values.new_zeros(1).double()).item()
    return value, inverse, base


@dataclass(frozen=True)
class FittedSpectrum(Solved):
    """`(C + λI)⁻¹` from eigenvectors: `inverse` on them, the number `base` on everything else."""

    pairs: Eigenpairs
    damping: float
    inverse: Tensor
    base: float

    @property
    def plan(self) -> Plan:  # type: ignore[override]
        """Blocks of the vectors."""
        return self.pairs.plan

    @property
    def precision(self) -> Precision:  # type: ignore[override]
        """Of the products of all pairs."""
        return self.pairs.precision

    def with_damping(self, damping: Damping) -> "FittedSpectrum":
        """The same curvature with another damping; its eigenvectors are kept."""
        return self.pairs.with_damping(damping)

    def solve(self, rows: Tensor) -> Tensor:
        """`(C + λI)⁻¹` applied to each row of `[m, P]`."""
        coefficients, outside = self._parts(rows)
        solved = (coefficients * self.inverse) @ self.pairs.vectors
        return solved.add_(outside, alpha=self.base).to(rows.dtype)

    def squared_norms(self, gradients: Gradients) -> Tensor:
        """`gᵀ (C + λI)⁻¹ g`, `[b]`, without going back from the eigenvectors."""
        norms = []
        for rows in flat(gradients, self.plan):
            coefficients, outside = self._parts(rows)
            inside = coefficients.square() @ self.inverse
            norms.append(inside + self.base * outside.square().sum(1))
        return torch.cat(norms)

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients `[m, r]` on the eigenvectors, and what is left of `[m, P]`.

        What is left is divided by the damping alone, which would blow up rounding: it is made
        orthogonal twice.
        """
        vectors = self.pairs.vectors
        rows = rows.to(vectors.dtype)
        coefficients = rows @ vectors.T
        if self.base == 0:
            return coefficients, torch.zeros_like(rows[:, :1]).expand_as(rows)
        outside = rows - coefficients @ vectors
        again = outside @ vectors.T
        return coefficients + again, outside.addmm_(again, vectors, alpha=-1.0)

    def tensors(self) -> dict[str, Tensor]:
        """Eigenvectors, eigenvalues and their damped inverses."""
        pairs = self.pairs
        return {
            "eigenvalues": pairs.values,
            "eigenvectors": pairs.vectors,
            "inverse": self.inverse,
            "scalars": torch.tensor([self.damping, self.base, pairs.mean], dtype=torch.float64),
        }

    def details(self) -> dict[str, Any]:
        """One λ for all, and how many eigenvectors there are."""
        found = {"damping_used": {"all": self.damping}, "eigenvectors": len(self.inverse)}
        return found | self.pairs.facts


def restored(
    plan: Plan,
    tensors: dict[str, Tensor],
    examples: int,
    *,
    complete: bool,
    rest: Rest = "damped",
    precision: Precision = "float32",
) -> FittedSpectrum:
    """What `FittedSpectrum.tensors` described."""
    damping, base, mean = tensors["scalars"].tolist()
    values, vectors = tensors["eigenvalues"], tensors["eigenvectors"]
    pairs = Eigenpairs(plan, values, vectors, mean, examples, complete, rest, precision)
    return FittedSpectrum(pairs, damping, tensors["inverse"], base)
