"""Search with an index: it proposes rows, and the store says what they are worth."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.index.base import Chosen, FoundRows, Kind, Recall
from forebear.search import Filter, TopRows, search_exact
from forebear.search.exact import checked_queries
from forebear.store import Store

FEW = 0.25
"""Share of the rows below which exact search of what a filter leaves is as fast, and complete."""

SCORED_BYTES = 2**26  # of rows in single and double precision, while they are re-scored


@dataclass(frozen=True)
class Searcher:
    """An index that is ready.

    Attributes:
        store: its rows.
        config: the settings of its kind.
        handle: what the kind's library searches in.
    """

    store: Store
    config: Kind
    handle: Any

    def search(
        self,
        queries: Tensor,
        k: int,
        *,
        filter: Filter | np.ndarray | None = None,
        opponents: bool = False,
    ) -> FoundRows:
        """The `k` strongest rows of each query among those the index finds.

        Values are exact: products in double precision with the rows as stored, rounded to float32,
        equal ones in the order of the rows, as those of `search_exact`. Rows may be missing.

        Where a filter leaves less than a quarter of the rows, and for queries of which the index
        finds fewer than `k` rows, exact search answers; `FoundRows.exact` says where.

        Args:
            queries: `[q, d]`, or `[d]` for one.
            k: rows of each query.
            filter: a condition on columns, or bool `[n]`; other rows play no part.
            opponents: the smallest products instead, smallest first.

        Raises:
            DataError: there is no query, `k` is below one or above the number of rows that match.
            MismatchError: queries and rows have other dimensions.
            NonFiniteError: a query is NaN or infinite.
        """
        queries = checked_queries(self.store, queries)
        chosen = None if filter is None else self._chosen(filter)
        size = len(self.store)
        left = size if chosen is None else int(chosen.mask.sum())
        count = max(k, round(k * self.config.refine))
        # A filter of a wrong shape and a k that cannot be are refused by exact search.
        wrong = chosen is not None and (chosen.mask.dtype, chosen.mask.shape) != (bool, (size,))
        if wrong or k < 1 or count >= left or left < FEW * size:
            mask = None if chosen is None else chosen.mask
            found = search_exact(self.store, queries, k, filter=mask, opponents=opponents)
            return FoundRows(found.positions, found.values, exact=np.ones(len(queries), bool))
        asked = -queries if opponents else queries
        proposed = self.config.propose(self.handle, asked.float().numpy(), count, chosen)
        if chosen is not None:  # whatever the library makes of the filter, ours decides
            proposed = np.where(chosen.mask[proposed], proposed, -1)
        positions, values = _strongest(proposed, self._scored(asked, proposed), k)
        lacking = positions[:, -1] < 0
        if lacking.any():
            mask = None if chosen is None else chosen.mask
            rest = search_exact(self.store, asked[torch.from_numpy(lacking)], k, filter=mask)
            positions[lacking], values[lacking] = rest.positions.numpy(), rest.values.numpy()
        return FoundRows(
            torch.from_numpy(positions),
            torch.from_numpy(-values if opponents else values),
            exact=lacking,
        )

    def measure(self, queries: Tensor, k: int, *, opponents: bool = False) -> Recall:
        """How much of the exact top `k` of these queries it finds; as costly as exact search."""
        found = self.search(queries, k, opponents=opponents)
        exact = search_exact(self.store, queries, k, opponents=opponents)
        return Recall.of(shares_found(found, exact), k, sampled=False)

    def _chosen(self, filter: Filter | np.ndarray) -> Chosen:
        if isinstance(filter, np.ndarray):
            return Chosen(filter, None)
        return Chosen(filter.matches(self._column, slice(0, len(self.store))), filter)

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self.store.column(name)
        return self._columns[name]

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        """Columns that filters have asked for: reading a million texts takes its time."""
        return {}

    def _scored(self, queries: Tensor, proposed: np.ndarray) -> np.ndarray:
        """`[q, c]` exact products of proposed rows; −∞ where none is proposed."""
        values = np.full(proposed.shape, -np.inf, np.float32)
        for part in self._parts(proposed):
            # Queries share many rows, and rows are read fastest many at a time.
            there, inverse = np.unique(proposed[part], return_inverse=True)
            rows = self.store.rows(np.maximum(there, 0))
            inverse = torch.from_numpy(inverse.reshape(proposed[part].shape))
            for query, where, out in zip(queries[part], inverse, values[part], strict=True):
                out[:] = (rows[where].double() * query.double()).sum(1).float().numpy()
        values[proposed < 0] = -np.inf
        return values

    def _parts(self, proposed: np.ndarray) -> Iterator[slice]:
        step = max(1, SCORED_BYTES // (12 * proposed.shape[1] * self.store.dimension))
        for start in range(0, len(proposed), step):
            yield slice(start, start + step)


def shares_found(found: TopRows, exact: TopRows) -> np.ndarray:
    """`[q]` share of the exact top k that was found; of equal rows any is as good as another."""
    pairs = zip(found.positions.numpy(), exact.positions.numpy(), strict=True)
    same = np.stack([np.isin(one, other) for one, other in pairs])
    return (same | (found.values == exact.values[:, -1:]).numpy()).mean(1)


def _strongest(proposed: np.ndarray, values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each query `[q, k]`, equal ones in the order of the rows."""
    order = np.lexsort((proposed, -values), axis=1)[:, :k]
    return np.take_along_axis(proposed, order, 1), np.take_along_axis(values, order, 1)
