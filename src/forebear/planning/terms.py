"""Which terms the cost of each method has, and how large a sample must be to behave like the whole.

Some methods work in one way for few examples and in another for many. A sample has to be taken on
the side of that border where the whole is; the borders are those of the code that they name.
"""

from dataclasses import dataclass
from typing import Any

PASSES = ("1", "n", "nq", "q")
"""Passes over the training set, and products of pairs."""

PAIRS = (*PASSES, "n2")
"""Each example also meets each other one, or a pass over all is made for each."""

TERMS: dict[str, tuple[str, ...]] = {
    "cg": PAIRS,  # self-influence solves for every example with products over all
    "lissa": PAIRS,
    "ekfac_cg": PAIRS,
    "datainf": PAIRS,
    "unrolled": PAIRS,
    "further_training": PAIRS,
    "leave_one_out": PAIRS,
    "nda": PAIRS,  # self-influence compares all training images with all
}
"""Of methods whose cost has more than `PASSES`."""

SCALED = {
    "forebear.methods.fitted_influence": "FEATURE_BYTES",  # projected gradients are kept, or not
    "forebear.methods.unlearned": "KEPT_BYTES",  # gradients are kept, or made again
    "forebear.curvature.kronecker": "KEPT_BYTES",  # factors are kept, or a second pass is made
    "forebear.curvature.datainf": "KEPT_BYTES",  # factors are kept, or the method is refused
}
"""Limits in bytes that n examples fill: a sample gets its share of each, to do what the whole does.
"""


@dataclass(frozen=True)
class Facts:
    """What is known about a task before anything is timed.

    Attributes:
        examples: of the training set.
        queries: to be scored.
        parameters: that are trained.
        outputs: rows of the Gauss-Newton matrix for each example.
        itemsize: bytes of a parameter.
        step: the most examples at a time that a method works on by default, where it is known.
    """

    examples: int
    queries: int
    parameters: int
    outputs: int = 1
    itemsize: int = 4
    step: int | None = None


def terms_of(method: str, configured: Any, facts: Facts) -> tuple[str, ...]:
    """Names of the terms of a method's cost in `cost.TERMS`."""
    if _gram(configured, facts):
        return (*PAIRS, "n3")
    return TERMS.get(method, PASSES)


def smallest_sample(configured: Any, facts: Facts) -> int:
    """Fewest examples with which a method works as it does with all of them."""
    from forebear.curvature import operator

    curvature = getattr(configured, "curvature", None)
    kind, size = _kind(curvature), facts.parameters
    rows = facts.outputs if kind == "gauss_newton" else 1
    everywhere = rows * facts.examples
    if _whole(curvature):
        return 1 if _gram(configured, facts) else -(-size // rows)
    if kind in ("gauss_newton", "fisher") and _iterative(curvature):
        # As `curvature_operator` chooses.
        if size <= everywhere and facts.itemsize * size * size <= operator.KEPT_BYTES:
            return -(-size // rows)
        if facts.itemsize * everywhere * size > operator.KEPT_BYTES:
            return operator.KEPT_BYTES // (facts.itemsize * rows * size) + 1
    return 1


def _gram(configured: Any, facts: Facts) -> bool:
    """Whether an exact curvature is that of the span of its rows, as `Whole` chooses."""
    curvature = getattr(configured, "curvature", None)
    if not _whole(curvature):
        return False
    rows = facts.outputs if _kind(curvature) == "gauss_newton" else 1
    return rows * facts.examples < facts.parameters


def _whole(curvature: Any) -> bool:
    """Whether it is an exact curvature in whichever form is smaller; Hessians have only one."""
    return type(curvature).__name__ == "Whole" and curvature.dense.kind != "hessian"


def _iterative(curvature: Any) -> bool:
    return type(curvature).__name__ in ("ConjugateGradients", "LiSSA", "Arnoldi", "Nystrom")


def _kind(curvature: Any) -> str | None:
    return getattr(getattr(curvature, "dense", curvature), "kind", None)
