"""Influence with the curvature inverted by iteration: only its products with vectors are formed."""

from typing import Literal

from forebear.curvature import ConjugateGradients, Damping
from forebear.curvature import LiSSA as NeumannSeries
from forebear.methods.influence import Influence


def CG(
    *,
    curvature: Literal["gauss_newton", "hessian", "fisher"] = "gauss_newton",
    damping: float | Damping = 1.0,
    tolerance: float = 1e-5,
    iterations: int = 300,
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Influence:
    """Influence by conjugate gradients (Martens 2010; Koh & Liang 2017).

    Args:
        curvature: the Gauss-Newton matrix of the mean training loss, its Hessian, or the empirical
            Fisher matrix; over all selected layers together.
        damping: λ; a number is relative to the mean eigenvalue.
        tolerance: relative residual at which a query has converged.
        iterations: most for each query.
        layers: restrict the method to these layers.
        seed: of the probes that estimate the mean eigenvalue where the matrix does not fit.
    """
    return Influence(
        name="cg",
        curvature=ConjugateGradients(kind=curvature, tolerance=tolerance, iterations=iterations),
        damping=damping,
        units="removal",
        layers=layers,
        seed=seed,
    )


def EKFACCG(
    *,
    curvature: Literal["gauss_newton", "hessian", "fisher"] = "gauss_newton",
    damping: float | Damping = 1.0,
    tolerance: float = 1e-5,
    iterations: int = 300,
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Influence:
    """Influence by conjugate gradients that EK-FAC preconditions.

    Args:
        curvature: the Gauss-Newton matrix of the mean training loss, its Hessian, or the empirical
            Fisher matrix; over all selected layers together.
        damping: λ, of the curvature and of EK-FAC; a number is relative to the mean eigenvalue.
        tolerance: relative residual at which a query has converged.
        iterations: most for each query.
        layers: restrict the method to these layers.
        seed: of EK-FAC's sampled targets, and of the probes that estimate the mean eigenvalue.
    """
    solver = ConjugateGradients(
        kind=curvature, tolerance=tolerance, iterations=iterations, preconditioner="ekfac"
    )
    return Influence(
        name="ekfac_cg",
        curvature=solver,
        damping=damping,
        units="removal",
        layers=layers,
        seed=seed,
    )


def LiSSA(
    *,
    curvature: Literal["gauss_newton", "hessian", "fisher"] = "gauss_newton",
    damping: float | Damping = 1.0,
    depth: int = 1000,
    scale: float | None = None,
    batch: int | None = None,
    repeats: int = 1,
    tolerance: float = 1e-5,
    preconditioner: Literal["none", "ekfac"] = "none",
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Influence:
    """Influence by a Neumann series (Agarwal, Bullins & Hazan 2017; Koh & Liang 2017).

    Args:
        curvature: the Gauss-Newton matrix of the mean training loss, its Hessian, or the empirical
            Fisher matrix; over all selected layers together.
        damping: λ; a number is relative to the mean eigenvalue.
        depth: most updates.
        scale: what the curvature is divided by; None finds a safe one by power iteration.
        batch: examples drawn for each update; None takes all.
        repeats: runs over drawn examples whose answers are averaged.
        tolerance: relative residual at which a query has converged, where all examples are used.
        preconditioner: `"ekfac"` makes it the iteration of ASTRA (Wang et al. 2025).
        layers: restrict the method to these layers.
        seed: of drawn examples, of power iteration and of EK-FAC's sampled targets.
    """
    solver = NeumannSeries(
        kind=curvature,
        depth=depth,
        scale=scale,
        batch=batch,
        repeats=repeats,
        tolerance=tolerance,
        preconditioner=preconditioner,
    )
    return Influence(
        name="lissa",
        curvature=solver,
        damping=damping,
        units="removal",
        layers=layers,
        seed=seed,
    )
