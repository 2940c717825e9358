"""How well scores find the examples that are known to be the right ones."""

from typing import Any

import numpy as np

from forebear.errors import DataError
from forebear.metrics.arrays import flags, numbers


def precision_at(scores: Any, relevant: Any, k: int) -> np.ndarray:
    """Share of the `k` highest scores that are relevant, `[q]`.

    Chance is the share of relevant examples among all, which belongs beside this number.

    Args:
        scores: `[q, n]` or `Scores`; of equal ones the earlier example comes first.
        relevant: bool `[q, n]`, or `[n]` for all queries.
        k: at least 1 and at most n.

    Raises:
        DataError: shapes do not agree, or `k` is out of range.
        NonFiniteError: a score is NaN or infinite.
    """
    hits = _hits(scores, relevant)
    _require_k(k, hits.shape[1])
    return hits[:, :k].mean(1)


def recall_at(scores: Any, relevant: Any, k: int) -> np.ndarray:
    """Share of the relevant examples that are among the `k` highest scores, `[q]`.

    Where more than `k` are relevant, the share of `k`: a perfect order always has one. NaN for
    queries without a relevant example. Arguments and errors as for `precision_at`.
    """
    hits = _hits(scores, relevant)
    _require_k(k, hits.shape[1])
    most = np.minimum(hits.sum(1), k).astype(float)
    return _ratio(hits[:, :k].sum(1), most)


def map_at(scores: Any, relevant: Any, k: int | None = None) -> np.ndarray:
    """Average precision over the relevant examples, `[q]`; its mean is known as mAP.

    The precision at the place of every relevant example, averaged: over all of them, or over those
    among the `k` highest scores, divided by as many as there could be. NaN for queries without a
    relevant example. Arguments and errors as for `precision_at`.
    """
    hits = _hits(scores, relevant)
    first = hits.shape[1] if k is None else k
    _require_k(first, hits.shape[1])
    most = np.minimum(hits.sum(1), first).astype(float)
    kept = hits[:, :first]
    precision = kept.cumsum(1) / np.arange(1, first + 1)
    return _ratio((precision * kept).sum(1), most)


def mrr(scores: Any, relevant: Any) -> np.ndarray:
    """One over the rank of the first relevant example, `[q]`; its mean is known as MRR.

    Zero for queries without a relevant example. Arguments and errors as for `precision_at`.
    """
    hits = _hits(scores, relevant)
    return np.where(hits.any(1), 1.0 / (hits.argmax(1) + 1), 0.0)


def _hits(scores: Any, relevant: Any) -> np.ndarray:
    """Whether the example at each rank is relevant, `[q, n]`, the highest score first."""
    values = numbers(scores, "scores", (None, None))
    wanted = np.asarray(relevant)
    shape = values.shape[1:] if wanted.ndim == 1 else values.shape
    marks = np.broadcast_to(flags(relevant, "relevant", shape), values.shape)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(marks, order, 1)


def _require_k(k: int, most: int) -> None:
    if not 1 <= k <= most:
        raise DataError(f"k is {k} and there are {most} examples: choose 1 to {most}")


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
