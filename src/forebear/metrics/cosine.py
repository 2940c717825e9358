"""Cosine similarity between scores and a gold standard, query by query."""

import warnings
from typing import Any

import numpy as np

from forebear.errors import NumericalWarning
from forebear.metrics.arrays import numbers


def cosine_similarity(scores: Any, gold: Any, *, center: bool = False) -> np.ndarray:
    """Cosine over examples between scores and gold, `[q]`; NaN where a vector is zero.

    Vectors are brought to unit length first, however short they are: nothing is added to a length,
    for effects of single examples are often tiny.

    Args:
        scores: `[q, m]` or `Scores`.
        gold: `[q, m]`, oriented and signed as scores are.
        center: subtract each query's mean over the examples from both, which makes it Pearson's
            correlation: a constant added to all scores of a query then costs nothing.

    Raises:
        DataError: shapes do not agree.
        NonFiniteError: an entry is NaN or infinite.
    """
    left = numbers(scores, "scores", (None, None))
    right = numbers(gold, "gold", left.shape)
    values = cosines(left, right, center=center)
    count = int(np.isnan(values).sum())
    if count:
        warnings.warn(
            f"{count} of {len(values)} queries have no cosine similarity: their scores or gold "
            "are zero for all examples; they are NaN",
            NumericalWarning,
            stacklevel=2,
        )
    return values


def cosines(a: np.ndarray, b: np.ndarray, *, center: bool = False) -> np.ndarray:
    """Cosines along the last axis, NaN where a vector is zero."""
    a, b = unit(a, center=center), unit(b, center=center)
    return np.clip((a * b).sum(-1), -1, 1)


def unit(values: np.ndarray, *, center: bool = False) -> np.ndarray:
    """Vectors along the last axis with length one; a zero vector becomes NaN."""
    if center:
        sizes = np.abs(values).max(-1, keepdims=True)
        values = values - values.mean(-1, keepdims=True)
        # What is left of a constant is only rounding.
        values = np.where(np.abs(values).max(-1, keepdims=True) <= 1e-12 * sizes, 0.0, values)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = values / np.abs(values).max(-1, keepdims=True)  # squares would underflow
        return values / np.sqrt((values * values).sum(-1, keepdims=True))
