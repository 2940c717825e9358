"""DataInf: influence in closed form, for fine-tuned models first."""

from forebear.curvature import Damping
from forebear.curvature import DataInf as DataInfCurvature
from forebear.gradients import Precision
from forebear.methods.influence import Influence


def DataInf(
    *,
    damping: float | Damping = 0.1,
    samples: int | None = None,
    precision: Precision = "float32",
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Influence:
    """Influence with a mean of inverses for the inverse of a mean (Kwon et al. 2024).

    Args:
        damping: λ; a number is relative to the mean squared gradient entry of each block.
        samples: examples that the curvature is made of, drawn at random; all when None, whose
            cost grows with the square of their number.
        precision: of the products of all pairs; `"bfloat16"` is faster on processors that have it.
        layers: restrict the method to these layers.
        seed: of the draw of samples.
    """
    return Influence(
        name="datainf",
        curvature=DataInfCurvature(samples=samples, precision=precision),
        damping=damping,
        units="removal",
        layers=layers,
        seed=seed,
    )
