"""Influence functions with Kronecker-factored curvature."""

from typing import Literal

from forebear.curvature import Damping, Kronecker
from forebear.gradients import Precision
from forebear.methods.influence import Influence


def KFAC(
    *,
    damping: float | Damping = 0.1,
    targets: Literal["sampled", "exact", "empirical"] = "sampled",
    draws: int = 1,
    sharing: Literal["expand", "reduce"] = "expand",
    damping_form: Literal["exact", "factored"] = "exact",
    rank: int | None = 128,
    tolerance: float = 0.018,
    precision: Precision = "float32",
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Influence:
    """Influence with K-FAC curvature (Martens & Grosse 2015).

    Args:
        damping: λ; a number is relative to the mean eigenvalue of each block.
        targets: sampled from the model, `"exact"`: all of them, in a backward pass for each
            output, or the training labels (`"empirical"`).
        draws: targets sampled for each example.
        sharing: whether positions of an example are samples for the factors (`"expand"`) or parts
            of one (`"reduce"`).
        damping_form: λ on the eigenvalues of the product, or √λ on each factor (`"factored"`).
        rank: most terms of the low-rank inverse for all pairs; None contracts exactly.
        tolerance: relative error allowed to it; fewer terms are used where they suffice.
        precision: of the products of all pairs; `"bfloat16"` is faster on processors that have it.
        layers: restrict the method to these layers.
        seed: of the sampled targets.
    """
    curvature = Kronecker(
        corrected=False,
        targets=targets,
        draws=draws,
        sharing=sharing,
        damping_form=damping_form,
        rank=rank,
        tolerance=tolerance,
        precision=precision,
    )
    return Influence(
        name="kfac",
        curvature=curvature,
        damping=damping,
        units="removal",
        layers=layers,
        seed=seed,
    )


def EKFAC(
    *,
    damping: float | Damping = 0.1,
    targets: Literal["sampled", "exact", "empirical"] = "sampled",
    draws: int = 1,
    sharing: Literal["expand", "reduce"] = "expand",
    rank: int | None = 128,
    tolerance: float = 0.018,
    precision: Precision = "float32",
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Influence:
    """Influence with eigenvalue-corrected K-FAC curvature (George et al. 2018; Grosse et al. 2023).

    Args:
        damping: λ; a number is relative to the mean eigenvalue of each block.
        targets: sampled from the model, `"exact"`: all of them, in a backward pass for each
            output, or the training labels (`"empirical"`).
        draws: targets sampled for each example.
        sharing: whether positions of an example are samples for the factors (`"expand"`) or parts
            of one (`"reduce"`).
        rank: most terms of the low-rank inverse for all pairs; None contracts exactly.
        tolerance: relative error allowed to it; fewer terms are used where they suffice.
        precision: of the products of all pairs; `"bfloat16"` is faster on processors that have it.
        layers: restrict the method to these layers.
        seed: of the sampled targets.
    """
    curvature = Kronecker(
        corrected=True,
        targets=targets,
        draws=draws,
        sharing=sharing,
        rank=rank,
        tolerance=tolerance,
        precision=precision,
    )
    return Influence(
        name="ekfac",
        curvature=curvature,
        damping=damping,
        units="removal",
        layers=layers,
        seed=seed,
    )
