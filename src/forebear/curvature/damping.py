"""How much is added to the curvature before it is inverted."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forebear.errors import DataError, TaskError


@dataclass(frozen=True)
class Relative:
    """`factor` times the mean eigenvalue of each block."""

    factor: float = 0.1

    def value(self, mean_eigenvalue: float) -> float:
        """λ of a block."""
        return self.factor * mean_eigenvalue


@dataclass(frozen=True)
class NonzeroRelative:
    """`factor` times the mean of the eigenvalues that can differ from zero: `trace / min(n, P)`.

    The second moment of n gradients of P parameters has at most n such eigenvalues. Their mean does
    not shrink with the number of parameters beyond that, so one factor suits whole gradients and
    projected ones.
    """

    factor: float = 1.0

    def value(self, mean_eigenvalue: float) -> float:
        """λ cannot be told from the mean eigenvalue alone.

        Raises:
            TaskError: always; curvatures that know their trace and size ask `damping_for`.
        """
        raise TaskError(
            "damping=fb.NonzeroRelative(...) needs the number of examples and the trace, which "
            "this curvature does not know: use dtrak, das, exact, ekfac, kfac or diagonal, or "
            "fb.Relative, fb.Absolute or fb.Horizon"
        )


@dataclass(frozen=True)
class Absolute:
    """The same λ for every block, in units of the curvature of the mean training loss."""

    amount: float

    def value(self, mean_eigenvalue: float) -> float:
        """λ of a block."""
        return self.amount


@dataclass(frozen=True)
class Horizon:
    """λ = 1 / (learning rate × steps): what so many steps of gradient descent leave unresolved.

    With `exact` the inverse itself gives way to what the steps do to a quadratic loss,
    `f_T(h) = (1 − (1 − ηh)^T) / h` for a learning rate η, T steps and an eigenvalue h, which needs
    a curvature whose eigenvalues are known. Near h = 0 it is ηT, the inverse of the same λ.
    """

    learning_rate: float
    steps: int
    exact: bool = False

    def value(self, mean_eigenvalue: float) -> float:
        """λ of a block.

        Raises:
            TaskError: `exact` was asked of a curvature that does not know its eigenvalues.
        """
        if self.exact:
            raise TaskError(
                "damping=fb.Horizon(..., exact=True) acts on eigenvalues, which this curvature "
                "does not know: use exact, ekfac, kfac, diagonal, arnoldi or nystrom, or "
                "exact=False, which damps with 1 / (learning rate × steps)"
            )
        return 1.0 / (self.learning_rate * self.steps)


@dataclass(frozen=True)
class EffectiveDimension:
    """λ such that `Σ h / (h + λ)` over eigenvalues h is `fraction` × min(n, P).

    The sum counts the directions that the data decide rather than the damping, of the most that n
    examples can decide about P parameters. For a block-diagonal curvature each block has its own λ.
    """

    fraction: float = 0.5

    def value(self, mean_eigenvalue: float) -> float:
        """λ cannot be told from the mean eigenvalue alone.

        Raises:
            TaskError: always; curvatures that know their eigenvalues ask `damping_for`.
        """
        raise TaskError(
            "damping=fb.EffectiveDimension(...) needs all eigenvalues, which this curvature does "
            "not know: use exact, ekfac, kfac or diagonal, or fb.Relative, fb.Absolute or "
            "fb.Horizon"
        )


Damping = Relative | NonzeroRelative | Absolute | Horizon | EffectiveDimension


def as_damping(damping: float | Damping) -> Damping:
    """A number is relative damping.

    Raises:
        DataError: it is negative, not finite, or no damping at all.
    """
    chosen = Relative(damping) if isinstance(damping, int | float) else damping
    if not isinstance(chosen, Damping):
        raise DataError(
            f"damping is {damping!r}: give a number, fb.Relative, fb.NonzeroRelative, fb.Absolute, "
            "fb.Horizon or fb.EffectiveDimension"
        )
    if isinstance(chosen, EffectiveDimension):
        if not 0 < chosen.fraction < 1:
            raise DataError(
                f"fraction of EffectiveDimension is {chosen.fraction}: it must be between 0 and 1"
            )
        return chosen
    if isinstance(chosen, Horizon):
        amount = chosen.learning_rate * chosen.steps
        value = 1.0 / amount if amount else math.inf
    elif isinstance(chosen, NonzeroRelative):
        value = chosen.factor
    else:
        value = chosen.value(1.0)
    if not math.isfinite(value) or value < 0:
        raise DataError(f"damping {damping} gives λ = {value}: it must be finite and not negative")
    return chosen


def damping_for(
    damping: Damping, eigenvalues: Tensor, examples: int, size: int | None = None
) -> float:
    """λ of a block whose eigenvalues are known.

    Args:
        damping: what was asked for.
        eigenvalues: those that are not zero, in any shape.
        examples: n.
        size: P, with eigenvalues that are zero and not listed; as many as are listed if left out.

    Raises:
        TaskError: a fraction of min(n, P) that is more than there are eigenvalues.
    """
    size = eigenvalues.numel() if size is None else size
    if isinstance(damping, EffectiveDimension):
        return _for_dimension(eigenvalues, damping.fraction * min(examples, size))
    if isinstance(damping, Horizon):
        return 1.0 / (damping.learning_rate * damping.steps)
    trace = eigenvalues.double().sum().item()
    if isinstance(damping, NonzeroRelative):
        return damping.factor * trace / min(examples, size)
    return damping.value(trace / size)


def damped_inverse(damping: Damping, value: float, eigenvalues: Tensor) -> Tensor:
    """`1 / (h + λ)` of each eigenvalue h, or what the steps of an exact horizon make of it.

    Raises:
        TaskError: the steps of an exact horizon diverge.
    """
    if not isinstance(damping, Horizon) or not damping.exact:
        return 1.0 / (eigenvalues + value)
    h = eigenvalues.double()
    rate, steps = damping.learning_rate, damping.steps
    highest = h.max().item() if h.numel() else 0.0
    if rate * highest > 2:
        raise TaskError(
            f"steps with learning rate {rate:.3g} diverge where the curvature is "
            f"h_max = {highest:.3g}: the largest stable learning rate is {2 / highest:.3g}; use "
            "that many more steps of a smaller one, or exact=False"
        )
    left = torch.where(rate * h < 1, (steps * torch.log1p(-rate * h)).expm1(), 0.0)
    left = torch.where(rate * h < 1, left, (1 - rate * h).pow(steps) - 1)
    response = torch.where(h == 0, rate * steps, -left / torch.where(h == 0, 1.0, h))
    return response.to(eigenvalues.dtype)


def _for_dimension(eigenvalues: Tensor, target: float) -> float:
    """λ with `Σ h / (h + λ)` at the target."""
    h = eigenvalues.double().flatten()
    top = h.max().item() if h.numel() else 0.0
    h = h[h > 1e-12 * top]
    if len(h) <= target:
        raise TaskError(
            f"the curvature has {len(h)} eigenvalues above zero, and EffectiveDimension asks for "
            f"an effective dimension of {target:.1f}: choose a smaller fraction"
        )

    def excess(log_damping: float) -> float:
        return (h / (h + math.exp(log_damping))).sum().item() - target

    low = math.log(h.min().item()) + math.log((len(h) - target) / len(h)) - 1.0
    high = math.log(h.sum().item() / target) + 1.0
    from scipy.optimize import brentq  # large, and rarely needed

    root: Any = brentq(excess, low, high, xtol=1e-12)
    return math.exp(root)
