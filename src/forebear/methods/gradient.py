"""First-order methods: products of gradients at one or several checkpoints."""

from forebear.methods.influence import Influence


def GradDot(*, layers: tuple[str, ...] | None = None) -> Influence:
    """Inner product of the query's and the example's loss gradients (Charpiat et al. 2019)."""
    return Influence(name="graddot", layers=layers)


def GradCos(*, layers: tuple[str, ...] | None = None) -> Influence:
    """Cosine of the query's and the example's loss gradients (Charpiat et al. 2019)."""
    return Influence(name="gradcos", normalise="cosine", layers=layers)


def TracIn(*, layers: tuple[str, ...] | None = None) -> Influence:
    """Gradient products summed over checkpoints with their learning rates (Pruthi et al. 2020).

    Uses the task's checkpoints; without any it is GradDot.
    """
    return Influence(name="tracin", checkpoints="sum", layers=layers)
