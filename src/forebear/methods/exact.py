"""Influence with an exact dense curvature, for few parameters."""

from typing import Literal

from forebear.curvature import Damping, Dense
from forebear.methods.influence import Influence


def Exact(
    *,
    curvature: Literal["hessian", "gauss_newton", "fisher"] = "hessian",
    damping: float | Damping = 0.1,
    indefinite: Literal["absolute", "clip", "keep"] = "absolute",
    layers: tuple[str, ...] | None = None,
) -> Influence:
    """Influence functions as they are written (Koh & Liang 2017).

    Args:
        curvature: the Hessian of the mean training loss, its Gauss-Newton part, or the empirical
            Fisher matrix; over all selected layers together.
        damping: λ; a number is relative to the mean eigenvalue.
        indefinite: what becomes of negative eigenvalues of a Hessian.
        layers: restrict the method to these layers; up to 20,000 parameters.
    """
    return Influence(
        name="exact",
        curvature=Dense(kind=curvature, indefinite=indefinite),
        damping=damping,
        units="removal",
        layers=layers,
    )
