"""RelatIF: influence for the change that it takes."""

from typing import Literal

from forebear.curvature import Curvature, Damping, Dense, Diagonal, Kronecker, Whole
from forebear.errors import unknown_name
from forebear.gradients import Precision
from forebear.methods.influence import Influence


def RelatIF(
    *,
    curvature: Literal["ekfac", "kfac", "diagonal", "gauss_newton", "hessian", "fisher"] = "ekfac",
    form: Literal["loss", "parameters"] = "loss",
    damping: float | Damping = 0.1,
    precision: Precision = "float32",
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Influence:
    """Influence divided by what the example does to the model at large (Barshan et al. 2020).

    Examples with large gradients, such as outliers, come first for every query in plain influence;
    here they do not.

    Args:
        curvature: `"ekfac"`, `"kfac"` or `"diagonal"`, or an exact matrix over all layers.
        form: `"loss"` divides by the root of the example's self-influence, `"parameters"` by the
            length of the step in parameters.
        damping: λ; a number is relative to the mean eigenvalue of each block.
        precision: of the products of all pairs; `"bfloat16"` is faster on processors that have it.
        layers: restrict the method to these layers.
        seed: of sampled targets.
    """
    matrices: dict[str, Curvature] = {
        "ekfac": Kronecker(corrected=True, precision=precision),
        "kfac": Kronecker(corrected=False, precision=precision),
        "diagonal": Diagonal(precision=precision),
        "gauss_newton": Whole(Dense(kind="gauss_newton", precision=precision)),
        "hessian": Whole(Dense(kind="hessian", precision=precision)),
        "fisher": Whole(Dense(kind="fisher", precision=precision)),
    }
    if curvature not in matrices:
        raise unknown_name("curvature of RelatIF", str(curvature), matrices)
    forms = {"loss": "relative", "parameters": "relative_parameters"}
    if form not in forms:
        raise unknown_name("form of RelatIF", str(form), forms)
    return Influence(
        name="relatif",
        curvature=matrices[curvature],
        damping=damping,
        normalise=forms[form],  # type: ignore[arg-type]
        layers=layers,
        seed=seed,
    )
