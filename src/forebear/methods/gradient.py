"""First-order methods: products of gradients at one or several checkpoints."""

from forebear.curvature import Identity
from forebear.gradients import Precision
from forebear.methods.influence import Influence


def GradDot(
    *, precision: Precision = "float32", layers: tuple[str, ...] | None = None
) -> Influence:
    """Inner product of the query's and the example's loss gradients (Charpiat et al. 2019)."""
    return Influence(name="graddot", curvature=Identity(precision), layers=layers)


def GradCos(
    *, precision: Precision = "float32", layers: tuple[str, ...] | None = None
) -> Influence:
    """Cosine of the query's and the example's loss gradients (Charpiat et al. 2019)."""
    return Influence(
        name="gradcos", curvature=Identity(precision), normalise="cosine", layers=layers
    )


def TracIn(*, precision: Precision = "float32", layers: tuple[str, ...] | None = None) -> Influence:
    """Gradient products summed over checkpoints with their learning rates (Pruthi et al. 2020).

    Uses the task's checkpoints; without any it is GradDot.
    """
    return Influence(name="tracin", curvature=Identity(precision), checkpoints="sum", layers=layers)
