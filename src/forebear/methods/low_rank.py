"""Influence with low-rank curvature."""

from typing import Literal

from forebear.curvature import Arnoldi as ArnoldiCurvature
from forebear.curvature import Damping
from forebear.curvature import Nystrom as NystromCurvature
from forebear.gradients import Precision
from forebear.methods.influence import Influence


def Arnoldi(
    *,
    curvature: Literal["hessian", "gauss_newton", "fisher"] = "gauss_newton",
    damping: float | Damping = 1.0,
    rank: int = 50,
    krylov: int = 100,
    rest: Literal["damped", "drop"] = "damped",
    precision: Precision = "float32",
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Influence:
    """Influence with the largest eigenpairs from an Arnoldi iteration (Schioppa et al. 2022).

    Args:
        curvature: the Gauss-Newton matrix, the Hessian, or the empirical Fisher matrix.
        damping: λ; a number is relative to the mean eigenvalue.
        rank: eigenpairs kept, by absolute value.
        krylov: dimension of the Krylov space: products with the curvature, one after the other.
        rest: directions outside are `"damped"` by λ alone, or `"drop"`ped.
        precision: of the products of all pairs; `"bfloat16"` is faster on processors that have it.
        layers: restrict the method to these layers.
        seed: of the first vector.
    """
    matrix = ArnoldiCurvature(
        kind=curvature, rank=rank, krylov=krylov, rest=rest, precision=precision
    )
    return Influence(
        name="arnoldi",
        curvature=matrix,
        damping=damping,
        units="removal",
        layers=layers,
        seed=seed,
    )


def Nystrom(
    *,
    curvature: Literal["gauss_newton", "fisher"] = "gauss_newton",
    damping: float | Damping = 1.0,
    rank: int = 100,
    rest: Literal["damped", "drop"] = "damped",
    precision: Precision = "float32",
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Influence:
    """Influence with a Nyström approximation of the curvature (Hataya & Yamada 2023).

    Args:
        curvature: the Gauss-Newton matrix, or the empirical Fisher matrix.
        damping: λ; a number is relative to the mean eigenvalue.
        rank: random vectors that the curvature is applied to, all together.
        rest: directions outside are `"damped"` by λ alone, or `"drop"`ped.
        precision: of the products of all pairs; `"bfloat16"` is faster on processors that have it.
        layers: restrict the method to these layers.
        seed: of the random vectors.
    """
    return Influence(
        name="nystrom",
        curvature=NystromCurvature(kind=curvature, rank=rank, rest=rest, precision=precision),
        damping=damping,
        units="removal",
        layers=layers,
        seed=seed,
    )
