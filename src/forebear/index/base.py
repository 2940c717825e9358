"""What an index over a store is, and what it says about itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from torch import Tensor

from forebear.errors import DataError
from forebear.search import Filter, TopRows
from forebear.store import Store

RESAMPLES = 2000


@dataclass(frozen=True)
class Recall:
    """How much of the exact answer an index gives.

    Attributes:
        k: rows wanted of each query.
        mean: share of the exact top k that was found, mean over queries.
        low: lower end of the 95% interval of the mean.
        high: its upper end.
        queries: how many were asked.
        sampled: whether they were rows of the store; they were given otherwise.
    """

    k: int
    mean: float
    low: float
    high: float
    queries: int
    sampled: bool = True

    @classmethod
    def of(cls, shares: np.ndarray, k: int, *, sampled: bool) -> "Recall":
        """From the share found of each query `[q]`; percentile bootstrap after Efron (1979)."""
        draws = np.random.default_rng(0).integers(0, len(shares), (RESAMPLES, len(shares)))
        low, high = np.quantile(shares[draws].mean(1), [0.025, 0.975])
        return cls(k, float(shares.mean()), float(low), float(high), len(shares), sampled)

    def __str__(self) -> str:
        asked = "sampled rows" if self.sampled else "queries"
        return (
            f"finds {self.mean:.1%} ({100 * self.low:.0f} to {100 * self.high:.0f}) of the exact "
            f"top {self.k}, measured on {self.queries} {asked}"
        )


@dataclass(frozen=True)
class Trial:
    """One setting of the effort of a search that was measured when the index was built.

    Attributes:
        settings: those that the effort depends on.
        recall: mean share of the exact top k.
        seconds: that searching for the sample took, re-scoring included.
        exact_seconds: that exact search took for the same, just before.
    """

    settings: Mapping[str, Any]
    recall: float
    seconds: float
    exact_seconds: float

    def __str__(self) -> str:
        effort = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return (
            f"{effort}: recall {self.recall:.3f} in {self.seconds:.3g} s, exact search "
            f"{self.exact_seconds:.3g} s"
        )


@dataclass(frozen=True)
class FoundRows(TopRows):
    """The strongest rows that an index found.

    Attributes:
        exact: `[q]` bool: queries that were answered by exact search, because the filter leaves
            few rows or the index found fewer than k.
    """

    exact: np.ndarray | None = None


class Index(Protocol):
    """Finds most of the strongest rows of a store, and knows how many."""

    @property
    def kind(self) -> str:
        """Its name in the table of kinds."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it was built with, defaults included."""
        ...

    @property
    def recall(self) -> Recall:
        """Measured against exact search when it was built."""
        ...

    def search(
        self,
        queries: Tensor,
        k: int,
        *,
        filter: Filter | np.ndarray | None = None,
        opponents: bool = False,
    ) -> TopRows:
        """The `k` strongest rows it finds of each query; values are exact."""
        ...


@dataclass(frozen=True)
class Chosen:
    """Rows that a filter leaves.

    Attributes:
        mask: `[n]` bool.
        condition: the filter it comes from; None where the mask was given.
    """

    mask: np.ndarray
    condition: Filter | None

    def harder(self, effort: int) -> int:
        """Effort that finds as much as `effort` does among all rows: most it meets do not count."""
        return ceil(effort * len(self.mask) / int(self.mask.sum()))


class Kind(Protocol):
    """The configuration of a kind of index: a frozen dataclass whose fields are its settings.

    It proposes rows and is not believed about their values.
    """

    libraries: ClassVar[tuple[str, ...]]
    """Distributions that build it."""
    files: ClassVar[tuple[str, ...]]
    """What it leaves in its folder and must be whole."""
    effort: ClassVar[tuple[str, ...]]
    """Settings that make a search slower and better."""

    @property
    def refine(self) -> float:
        """Rows proposed for each one wanted."""
        ...

    def build(self, store: Store, folder: Path, seed: int) -> tuple[Self, Any]:
        """Build it, leave files in `folder`: the settings with defaults filled in, and a handle."""
        ...

    def open(self, store: Store, folder: Path) -> Any:
        """A handle of what was built."""
        ...

    def propose(
        self, handle: Any, queries: np.ndarray, count: int, chosen: Chosen | None
    ) -> np.ndarray:
        """`[q, count]` positions of rows with large products with queries `[q, d]`; −1 for none."""
        ...

    def harder(self, rows: int) -> Self | None:
        """The same with twice the effort; None where more would change nothing."""
        ...


def require_positive(config: Any, *names: str) -> None:
    """Raise `DataError` for a setting that is below one or no whole number."""
    for name in names:
        value = getattr(config, name)
        whole = name == "refine" or value is None or isinstance(value, int)
        if not whole or isinstance(value, bool | str) or (value is not None and value < 1):
            kind = "a number" if name == "refine" else "a whole number"
            raise DataError(f"{name} is {value!r}: it must be {kind} of at least 1")
