"""How much faster the measurement falls without the strongest proponents than at random."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from forebear.errors import DataError
from forebear.metrics.arrays import numbers


@dataclass(frozen=True)
class RemovalCurve:
    """A removal curve.

    Attributes:
        fractions: `[k + 1]` share removed, from 0.
        curve: `[k + 1, q]` drop of the measurement beyond that of random removal.
        area: `[q]` mean height of the curve. Above zero: proponents mattered more than chance.
    """

    fractions: np.ndarray
    curve: np.ndarray
    area: np.ndarray


def removal_curve(fractions: Any, removed: Any, random: Any, full: Any) -> RemovalCurve:
    """Drop in the measurement after removing examples, beyond that after random removal.

    `curve = (random − removed) / scale` with scale the mean absolute measurement of the queries
    with everything in place, one number for all of them, so that queries stay comparable and one
    whose measurement is near zero does not dominate.

    Args:
        fractions: `[k]` share of the examples removed, rising.
        removed: `[k, q]` measurement without the highest-scoring examples.
        random: `[k, q]` measurement without as many random ones.
        full: `[q]` measurement with everything.

    Raises:
        DataError: shapes do not agree, fractions do not rise, or all of `full` is zero.
    """
    fractions = numbers(fractions, "fractions", (None,))
    removed = numbers(removed, "removed", (len(fractions), None))
    random = numbers(random, "random", removed.shape)
    full = numbers(full, "full", removed.shape[1:])
    if not len(fractions) or fractions[0] <= 0 or (np.diff(fractions) <= 0).any():
        raise DataError(f"fractions are {fractions.tolist()}: they must rise from above 0")
    scale = np.abs(full).mean()
    if scale == 0:
        raise DataError("every measurement with everything in place is 0: there is no scale")
    curve = np.concatenate([np.zeros_like(removed[:1]), (random - removed) / scale])
    fractions = np.concatenate([[0.0], fractions])
    area = np.trapezoid(curve, fractions, axis=0) / fractions[-1]
    return RemovalCurve(fractions, curve, area)
