"""How much is added to the curvature before it is inverted."""

import math
from dataclasses import dataclass

from forebear.errors import DataError


@dataclass(frozen=True)
class Relative:
    """`factor` times the mean eigenvalue of each block."""

    factor: float = 0.1

    def value(self, mean_eigenvalue: float) -> float:
        """λ of a block."""
        return self.factor * mean_eigenvalue


@dataclass(frozen=True)
class Absolute:
    """The same λ for every block, in units of the curvature of the mean training loss."""

    amount: float

    def value(self, mean_eigenvalue: float) -> float:
        """λ of a block."""
        return self.amount


@dataclass(frozen=True)
class Horizon:
    """λ = 1 / (learning rate × steps): what so many steps of gradient descent leave unresolved."""

    learning_rate: float
    steps: int

    def value(self, mean_eigenvalue: float) -> float:
        """λ of a block."""
        return 1.0 / (self.learning_rate * self.steps)


Damping = Relative | Absolute | Horizon


def as_damping(damping: float | Damping) -> Damping:
    """A number is relative damping.

    Raises:
        DataError: it is negative, not finite, or no damping at all.
    """
    chosen = Relative(damping) if isinstance(damping, int | float) else damping
    if not isinstance(chosen, Relative | Absolute | Horizon):
        raise DataError(
            f"damping is {damping!r}: give a number, fb.Relative, fb.Absolute or fb.Horizon"
        )
    try:
        value = chosen.value(1.0)
    except ZeroDivisionError:
        value = math.inf
    if not math.isfinite(value) or value < 0:
        raise DataError(f"damping {damping} gives λ = {value}: it must be finite and not negative")
    return chosen
