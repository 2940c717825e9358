"""D-TRAK: TRAK's kernel with a function of the model's output in place of the loss."""

from typing import Literal

from forebear.curvature import Damping
from forebear.gradients import Precision
from forebear.methods.diffusion_gradients import RIDGE, kernel
from forebear.methods.influence import Influence
from forebear.projections import Compression


def DTRAK(
    *,
    function: Literal["square_norm", "mean", "absolute", "loss"] = "square_norm",
    points: Literal["mean", "unit"] = "mean",
    damping: float | Damping = RIDGE,
    dimension: int | None = None,
    projection: Compression = "tensor_sketch",
    precision: Precision = "float32",
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Influence:
    """`g_qᵀ (GᵀG / n + λI)⁻¹ g_z`, with gradients of `mean ε²` (Zheng et al. 2024, D-TRAK).

    The function knows nothing of the noise that was really added. For networks that predict
    something else than the noise, it is that of the noise which their prediction amounts to.

    Args:
        function: of the noise that the network sees: `"square_norm"`, `"mean"` or `"absolute"`; or
            the training `"loss"`, which is TRAK for diffusion.
        points: `"unit"` scales the gradient at every level of noise to unit length first.
        damping: λ; a number is relative to the mean eigenvalue. The mean of those that can differ
            from zero when left out.
        dimension: of a projection; None compares whole gradients, exactly, which takes memory for
            all of them where they are fewer than parameters.
        projection: `"tensor_sketch"`, which acts on factors, `"gaussian"` or `"sjlt"`.
        precision: of the products of all pairs; the dual form, of fewer examples than parameters,
            has its own.
        layers: restrict the method to these layers.
        seed: of the projection.
    """
    return Influence(
        name="dtrak",
        gradient=function,
        points=points,
        **kernel(damping, dimension, projection, precision, layers, seed),
    )
