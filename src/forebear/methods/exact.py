"""Influence with an exact dense curvature, for few parameters."""

from typing import Literal

from forebear.curvature import Damping, Dense, Whole
from forebear.methods.influence import Influence


def Exact(
    *,
    curvature: Literal["hessian", "gauss_newton", "fisher"] = "hessian",
    damping: float | Damping = 1.0,
    blocks: Literal["all", "layers"] = "all",
    indefinite: Literal["absolute", "clip", "keep", "pseudo_inverse"] = "absolute",
    cutoff: float = 1e-6,
    layers: tuple[str, ...] | None = None,
) -> Influence:
    """Influence functions as they are written (Koh & Liang 2017).

    A Gauss-Newton or Fisher matrix of few examples and many parameters is treated in the span of
    its rows, with the same scores: see `Whole`.

    Args:
        curvature: the Hessian of the mean training loss, its Gauss-Newton part, or the empirical
            Fisher matrix.
        damping: λ; a number is relative to the mean eigenvalue of each matrix.
        blocks: one matrix over all selected layers together, or one for each of the `"layers"`.
        indefinite: what becomes of negative eigenvalues of a Hessian; `"pseudo_inverse"` keeps
            them and leaves directions out whose damped eigenvalue is nearly zero.
        cutoff: below which share of the largest it is.
        layers: restrict the method to these layers; up to 20,000 parameters, or as many rows.
    """
    dense = Dense(kind=curvature, blocks=blocks, indefinite=indefinite, cutoff=cutoff)
    one = blocks == "all" and indefinite != "pseudo_inverse"
    return Influence(
        name="exact",
        curvature=Whole(dense) if one else dense,
        damping=damping,
        units="removal",
        layers=layers,
    )
