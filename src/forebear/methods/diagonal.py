"""Influence with diagonal curvature."""

from typing import Literal

from forebear.curvature import Damping
from forebear.curvature import Diagonal as DiagonalCurvature
from forebear.gradients import Precision
from forebear.methods.influence import Influence


def Diagonal(
    *,
    damping: float | Damping = 0.1,
    targets: Literal["sampled", "exact", "empirical"] = "sampled",
    precision: Precision = "float32",
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Influence:
    """Influence with the diagonal of the Fisher matrix: every parameter by itself.

    Args:
        damping: λ; a number is relative to the mean eigenvalue of each block.
        targets: sampled from the model, `"exact"` (the Gauss-Newton matrix's own diagonal), or the
            training labels (`"empirical"`).
        precision: of the products of all pairs; `"bfloat16"` is faster on processors that have it.
        layers: restrict the method to these layers.
        seed: of the sampled targets.
    """
    return Influence(
        name="diagonal",
        curvature=DiagonalCurvature(targets=targets, precision=precision),
        damping=damping,
        units="removal",
        layers=layers,
        seed=seed,
    )
