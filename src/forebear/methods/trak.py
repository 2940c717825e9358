"""TRAK: a kernel of projected output gradients, weighted with residuals."""

from forebear.curvature import Damping, Dense, Whole
from forebear.gradients import Precision
from forebear.methods.influence import Influence
from forebear.projections import Compression, compressed


def TRAK(
    *,
    dimension: int | None = 2048,
    damping: float | Damping = 0.01,
    projection: Compression = "tensor_sketch",
    precision: Precision = "float32",
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Influence:
    """`φ(q)ᵀ (ΦᵀΦ / n + λI)⁻¹ φ(z) · (1 − p_z)`, averaged over checkpoints (Park et al. 2023).

    φ is the projected gradient of the model output (log odds of the correct class). Products and
    weights are averaged apart, as in the paper; without checkpoints the model itself is the one.

    Args:
        dimension: of the projection; None compares whole gradients, which suits small models.
        damping: λ; a number is relative to the mean eigenvalue of the kernel. The paper has none,
            which needs many more examples than dimensions.
        projection: `"tensor_sketch"` acts on factors; `"gaussian"` is the dense reference, and
            `"sjlt"` a sparse one.
        precision: of the products of all pairs; `"bfloat16"` is faster where processors have it.
        layers: restrict the method to these layers.
        seed: of the projections.
    """
    dense = Dense(kind="fisher", precision=precision)
    return Influence(
        name="trak",
        gradient="output",
        curvature=dense if dimension is not None else Whole(dense),
        projection=compressed(dimension, projection),
        damping=damping,
        checkpoints="mean",
        units="removal",
        layers=layers,
        seed=seed,
    )
