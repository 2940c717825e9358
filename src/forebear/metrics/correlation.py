"""Correlation column by column, for all queries at once."""

import warnings
from typing import Literal

import numpy as np
from scipy.stats import rankdata

from forebear.errors import NumericalWarning, unknown_name

Kind = Literal["pearson", "spearman"]

CONSTANT = 1e-12
"""A column whose spread is below this share of its size holds only rounding."""


def correlations(a: np.ndarray, b: np.ndarray, kind: str = "spearman") -> np.ndarray:
    """Correlation of the columns of `a` and `b`, both `[m, q]`; NaN where one is constant.

    Raises:
        UnknownNameError: `kind` is neither `"pearson"` nor `"spearman"`.
    """
    if kind not in ("pearson", "spearman"):
        raise unknown_name("kind of correlation", kind, ("pearson", "spearman"))
    constant = _constant(a) | _constant(b)
    if kind == "spearman":
        a, b = rankdata(a, axis=0), rankdata(b, axis=0)
    a, b = a - a.mean(0), b - b.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Each is scaled first: products of tiny effects would underflow.
        a, b = a / np.abs(a).max(0), b / np.abs(b).max(0)
        values = (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return np.where(constant, np.nan, np.clip(values, -1, 1))


def warn_of_constants(values: np.ndarray, what: str) -> None:
    """Warn with the number of queries whose correlation is undefined."""
    count = int(np.isnan(values).sum())
    if count:
        warnings.warn(
            f"{count} of {len(values)} queries have no {what}: their scores or outcomes are "
            "constant; they are NaN",
            NumericalWarning,
            stacklevel=3,
        )


def _constant(values: np.ndarray) -> np.ndarray:
    return np.ptp(values, axis=0) <= CONSTANT * np.abs(values).max(0)
