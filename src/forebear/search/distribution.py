"""Where scores lie among those of all rows: quantiles and ranks, in one pass and bounded memory."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from forebear.errors import DataError
from forebear.progress import track
from forebear.search.exact import checked_queries, chosen_rows, row_lengths
from forebear.search.filters import Filter
from forebear.search.rows import Rows
from forebear.search.running import RunningQuantiles
from forebear.store.rows import decode

ROWS = 4096  # at a time: their scores stay in a core's cache


def quantiles(
    store: Rows,
    queries: Tensor,
    levels: Sequence[float],
    *,
    filter: Filter | np.ndarray | None = None,
) -> Tensor:
    """`[q, l]` quantiles of each query's scores of all rows, within 0.8% of a score (float32).

    The quantile of level 0.99 is the smallest score that at least 99% of the rows do not exceed.
    Memory is 256 KB a query, whatever the number of rows.

    Args:
        store: the rows, `[n, d]`.
        queries: `[q, d]`, or `[d]` for one.
        levels: `[l]` between 0 and 1.
        filter: a condition on columns, or bool `[n]`; other rows play no part.

    Raises:
        DataError: a level is not between 0 and 1, or the filter leaves no row.
        MismatchError: queries and rows have other dimensions.
        NonFiniteError: a query or row is NaN or infinite.
    """
    bad = [level for level in levels if not 0 <= level <= 1]
    if bad or not len(levels):
        raise DataError(f"levels are {list(levels)}: give at least one, all between 0 and 1")
    queries = checked_queries(store, queries)
    running = RunningQuantiles.empty(len(queries))
    for rows in _scores(store, queries.float(), filter, "quantiles"):
        running = running.add(rows.T)
    return torch.stack([running.at(level) for level in levels], 1)


def ranks(
    store: Rows,
    queries: Tensor,
    values: Tensor,
    *,
    filter: Filter | np.ndarray | None = None,
) -> Tensor:
    """`[q, m]` how many rows have a larger score than each of `values`: 0 for the strongest row.

    Scores are products in double precision rounded to float32, as those of `search_exact` are, so
    that the values it finds have the ranks 0, 1, 2 … unless some are equal.

    Args:
        store: the rows, `[n, d]`.
        queries: `[q, d]`, or `[d]` for one.
        values: `[q, m]` scores of each query, or `[m]` for one query.
        filter: a condition on columns, or bool `[n]`; other rows play no part.

    Raises:
        DataError: there are not as many lists of values as queries, one of them is NaN, or the
            filter leaves no row.
        MismatchError: queries and rows have other dimensions.
        NonFiniteError: a query or row is NaN or infinite.
    """
    queries = checked_queries(store, queries)
    asked = values[None] if values.ndim == 1 else values
    if asked.ndim != 2 or len(asked) != len(queries) or torch.isnan(asked).any():
        raise DataError(
            f"values have shape {tuple(values.shape)} for {len(queries)} queries: give numbers "
            "[q, m], some of each query"
        )
    ordered, order = asked.detach().cpu().float().contiguous().sort(1)
    above = torch.zeros(len(queries), asked.shape[1] + 1, dtype=torch.int64)
    for rows in _scores(store, queries.double(), filter, "ranks"):
        place = torch.searchsorted(ordered, rows.T.contiguous())  # values that a score exceeds
        above.scatter_add_(1, place, torch.ones_like(place))
    larger = above.flip(1).cumsum(1).flip(1)[:, 1:]
    return torch.empty_like(order).scatter_(1, order, larger)


def _scores(
    store: Rows, queries: Tensor, filter: Filter | np.ndarray | None, name: str
) -> Iterator[Tensor]:
    """Scores `[b, q]` in float32 of the rows that the filter leaves, in the queries' precision."""
    row_lengths(store)
    chosen = None if filter is None else chosen_rows(store, filter)
    if chosen is not None and not chosen.any():
        raise DataError("the filter leaves no row: filter less")
    for block in track(store.blocks(ROWS), name):
        kept = None if chosen is None else torch.from_numpy(chosen[block.rows])
        rows = decode(block.values, block.scales)
        rows = rows if kept is None else rows[kept]
        yield (rows.to(queries.dtype) @ queries.T).float()
