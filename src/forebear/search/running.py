"""Answers kept while scores stream past, in memory that does not grow with their number.

All of them can be merged: two machines that saw different rows join what they kept, and the result
is that of one machine that saw all of them, whatever was merged first.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forebear.errors import DataError, MismatchError, NonFiniteError

QUANTILE_ERROR = 2.0**-7
"""Largest relative error of a running quantile."""

SHIFT = 17  # bits of a float32 that a bucket leaves out: 6 of the mantissa stay
BUCKETS = 2 ** (32 - SHIFT)


@dataclass(frozen=True)
class RunningTop:
    """The `k` largest values of several lists, and where they stood; ties keep the first.

    Attributes:
        k: how many are kept of each list.
        lists: number of lists; a query is one, or a query and a group.
        keys: `[m]` the list of each kept value, ascending.
        positions: `[m]`.
        values: `[m]` descending within a list, as precise as the most precise that came.
    """

    k: int
    lists: int
    keys: np.ndarray
    positions: np.ndarray
    values: np.ndarray

    @classmethod
    def empty(cls, k: int, lists: int) -> "RunningTop":
        """Nothing was seen yet."""
        whole = np.empty(0, np.int64)
        return cls(k, lists, whole, whole, np.empty(0, np.float32))

    def add(self, keys: np.ndarray, positions: np.ndarray, values: np.ndarray) -> "RunningTop":
        """With further values `[b]` of lists `keys` `[b]`, each position once a list.

        Raises:
            NonFiniteError: a value is NaN.
        """
        if np.isnan(values).any():
            raise NonFiniteError("a score is NaN: it has no place in an order")
        keys = np.concatenate([self.keys, keys])
        positions = np.concatenate([self.positions, positions])
        values = np.concatenate([self.values, values])
        order = np.lexsort((positions, -values, keys))
        keys = keys[order]
        starts = np.searchsorted(keys, np.arange(self.lists))
        kept = np.arange(len(keys)) - starts[keys] < self.k
        order = order[kept]
        return RunningTop(self.k, self.lists, keys[kept], positions[order], values[order])

    def merge(self, other: "RunningTop") -> "RunningTop":
        """What was kept of two disjoint sets of positions, as if they had been one.

        Raises:
            MismatchError: they keep other numbers of values, or have other lists.
        """
        if (self.k, self.lists) != (other.k, other.lists):
            raise MismatchError(
                f"one keeps {self.k} values of {self.lists} lists and the other {other.k} of "
                f"{other.lists}: only equal ones can be merged"
            )
        return self.add(other.keys, other.positions, other.values)

    def thresholds(self) -> np.ndarray:
        """`[lists]` what a new value must exceed: the k-th one, or −∞ while there are fewer."""
        ends = np.searchsorted(self.keys, np.arange(self.lists), side="right")
        starts = np.searchsorted(self.keys, np.arange(self.lists))
        found = np.full(self.lists, -np.inf, self.values.dtype)
        full = ends - starts == self.k
        found[full] = self.values[ends[full] - 1]
        return found


@dataclass(frozen=True)
class RunningQuantiles:
    """Quantiles of several lists of numbers, each within 0.8% of a value that stood there.

    A histogram whose buckets are the leading 15 bits of float32 (sign, exponent, 6 bits of the
    mantissa), so that it needs no range beforehand and merging is adding: the order of merging
    changes nothing. It takes 256 KB a list.

    Attributes:
        counts: `[lists, 32768]` int64.
    """

    counts: Tensor

    @classmethod
    def empty(cls, lists: int) -> "RunningQuantiles":
        """Nothing was seen yet."""
        return cls(torch.zeros(lists, BUCKETS, dtype=torch.int64))

    def add(self, values: Tensor) -> "RunningQuantiles":
        """With further values `[lists, b]`.

        Raises:
            NonFiniteError: a value is NaN or infinite.
        """
        if not torch.isfinite(values).all():
            raise NonFiniteError("a score is NaN or infinite: quantiles are of finite numbers")
        buckets = _buckets(values)
        counts = self.counts.scatter_add(1, buckets, torch.ones_like(buckets))
        return RunningQuantiles(counts)

    def merge(self, other: "RunningQuantiles") -> "RunningQuantiles":
        """Of both sets of values.

        Raises:
            MismatchError: they have other numbers of lists.
        """
        if self.counts.shape != other.counts.shape:
            raise MismatchError(
                f"one has {len(self.counts)} lists and the other {len(other.counts)}: only equal "
                "ones can be merged"
            )
        return RunningQuantiles(self.counts + other.counts)

    def at(self, share: float) -> Tensor:
        """`[lists]` the smallest value that at least this share of a list does not exceed.

        The middle of its bucket: at most `QUANTILE_ERROR` away, relative to the value itself.

        Raises:
            DataError: the share is not between 0 and 1, or nothing was seen.
        """
        if not 0 <= share <= 1:
            raise DataError(f"share is {share}: choose 0 to 1")
        totals = self.counts.sum(1)
        if (totals == 0).any():
            raise DataError("quantiles of nothing: add values first")
        # In double precision: 0.3 * 10 must not become the fourth of ten values.
        ranks = (share * totals.double() * (1 - 1e-12)).ceil().clamp_min(1).long()
        buckets = torch.searchsorted(self.counts.cumsum(1), ranks[:, None])[:, 0]
        return _middles()[buckets]


def _buckets(values: Tensor) -> Tensor:
    """Positions of buckets, ascending with the value: negative numbers have their bits flipped."""
    bits = values.float().contiguous().view(torch.int32).long()
    leading = (bits & 0x7FFFFFFF) >> SHIFT
    half = BUCKETS // 2
    return torch.where(bits < 0, half - 1 - leading, half + leading)


def _middles() -> Tensor:
    """What each bucket stands for, `[BUCKETS]`; zero for the one that begins at zero."""
    half = BUCKETS // 2
    leading = torch.arange(half, dtype=torch.int64) << SHIFT
    middle = (leading + 2 ** (SHIFT - 1)).to(torch.int32).view(torch.float32)
    middle[0] = 0.0
    return torch.cat([-middle.flip(0), middle])
