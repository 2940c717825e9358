"""How far an average over seeds can be trusted: agreement of its halves."""

from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
from scipy.stats import rankdata

from forebear.errors import DataError, unknown_name
from forebear.metrics.arrays import plain
from forebear.metrics.ceiling import SPLITS, halves
from forebear.metrics.cosine import cosines

Agreement = Literal["cosine", "pearson", "spearman"]


def split_half_reliability(values: Any, kind: Agreement = "cosine") -> np.ndarray:
    """Reliability of the mean over seeds of vectors along the last axis, `[...]`.

    The seeds are split into halves in every way (50 at most, averaged), the agreement r of the
    halves' means is measured, and the mean over all seeds then agrees with another as long by
    2r / (1 + r), after Spearman and Brown. The formula is exact for the correlation under
    independent noise and the usual approximation for the others. NaN for zero vectors.

    Args:
        values: `[seeds, ..., m]`; two seeds or more.
        kind: `"cosine"`, `"pearson"` or `"spearman"`.

    Raises:
        DataError: there are fewer than two seeds, or no axis of vectors.
    """
    if kind not in get_args(Agreement):
        raise unknown_name("kind of agreement", kind, get_args(Agreement))
    array = np.asarray(plain(values), dtype=np.float64)
    if array.ndim < 2 or len(array) < 2:
        raise DataError(
            f"values have shape {array.shape}: agreement needs two seeds or more, [seeds, ..., m]"
        )
    seeds = len(array)
    agreement = np.mean(
        [
            _agreement(array[list(one)].mean(0), array[list(other)].mean(0), kind)
            for one, other in islice(halves(seeds), SPLITS)
        ],
        axis=0,
    )
    longer = seeds / (seeds // 2)
    return longer * agreement / (1 + (longer - 1) * np.maximum(agreement, 0))


def _agreement(a: np.ndarray, b: np.ndarray, kind: Agreement) -> np.ndarray:
    if kind == "spearman":
        a, b = rankdata(a, axis=-1), rankdata(b, axis=-1)
    return cosines(a, b, center=kind != "cosine")
