"""What a projection is: a linear map of a gradient to a short vector."""

from typing import Protocol

from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Gradients


class Projection(Protocol):
    """A random linear map that keeps inner products in expectation; a frozen configuration."""

    def prepare(self, plan: Plan, seed: int) -> "PreparedProjection":
        """Draw the map for the blocks of a plan."""
        ...


class PreparedProjection(Protocol):
    """A drawn map."""

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each part of the result: one part `"projected"`, or one for each block."""
        ...

    def features(self, gradients: Gradients) -> Tensor:
        """Projected gradients `[b, k]`, k the sum of `sizes`."""
        ...
