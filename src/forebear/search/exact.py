"""Exact search: the strongest rows of all, in one pass over them and in bounded memory."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forebear.data import require_finite
from forebear.errors import DataError, MismatchError
from forebear.progress import track
from forebear.search.filters import Filter
from forebear.search.rows import Rows
from forebear.search.running import RunningTop
from forebear.search.screening import EXACT_ROWS, Screen

MOST_ROWS = 2**15
PAIRS = 2**21  # products of one piece of work: four megabytes in bfloat16
WIDTH = 128  # rows whose largest product decides whether any of them is looked at
FEW = 0.25  # share of the rows of a part below which picking them out is less work than them all


@dataclass(frozen=True)
class TopRows:
    """The strongest rows of each query, strongest first; equal ones in the order of the rows.

    Attributes:
        positions: `[q, k]`, or `[q, g, k]` with groups.
        values: exact products rounded to float32, of the same shape.
        groups: `[g]` labels of the groups, ascending; None without.
    """

    positions: Tensor
    values: Tensor
    groups: np.ndarray | None = None


@dataclass(frozen=True)
class Part:
    """Rows that one worker looks at.

    Attributes:
        values: `[b, d]` as stored.
        scales: of the values, or None.
        positions: `[b]`.
        lengths: `[b]` of the rows.
        groups: `[b]`, or None.
        chosen: `[b]` bool which of them a filter leaves; None for all.
    """

    values: Tensor
    scales: Tensor | None
    positions: np.ndarray
    lengths: Tensor
    groups: Tensor | None
    chosen: Tensor | None

    @property
    def longest(self) -> float:
        """Length of the longest row."""
        return float(self.lengths.max())

    def near(self, reach: float) -> "Part | None":
        """Without rows that the filter left out, and mostly without those shorter than `reach`.

        The latter stay where picking out the others would be more work; None when none is left.
        """
        kept = self.lengths > reach
        if self.chosen is not None:
            kept &= self.chosen
        count = int(kept.sum())
        if count == 0:
            return None
        if count > FEW * len(kept):
            if self.chosen is None or bool(self.chosen.all()):
                return self
            kept = self.chosen
        where = kept.nonzero()[:, 0]
        return Part(
            self.values.index_select(0, where),
            None if self.scales is None else self.scales[where],
            self.positions[where.numpy()],
            self.lengths[where],
            None if self.groups is None else self.groups[where],
            None,
        )


Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Lists, positions and exact values of rows that may be among the strongest, `[m]` each."""


def search_exact(
    store: Rows,
    queries: Tensor,
    k: int,
    *,
    filter: Filter | np.ndarray | None = None,
    group: str | np.ndarray | None = None,
    opponents: bool = False,
) -> TopRows:
    """The `k` rows with the largest products with each query, or the smallest ones.

    Values are those of products in double precision, rounded to float32: they depend neither on
    the size of blocks nor on the number of threads, of which as many are used as torch has.

    Args:
        store: the rows, `[n, d]`.
        queries: `[q, d]`, or `[d]` for one.
        k: rows of each query, and of each group.
        filter: a condition on columns, or bool `[n]`; other rows play no part.
        group: a column, or labels `[n]`: the `k` strongest rows of each group are wanted.
        opponents: the smallest products instead, smallest first.

    Raises:
        DataError: there is no query, `k` is below one, or above the number of rows that match the
            filter or are in a group.
        MismatchError: queries and rows have other dimensions.
        NonFiniteError: a query or row is NaN or infinite.
    """
    queries = checked_queries(store, queries)
    chosen = None if filter is None else chosen_rows(store, filter)
    labels, members = _groups(store, group, chosen)
    _require_rows(k, len(store) if chosen is None else int(chosen.sum()), labels, members, chosen)
    lengths = row_lengths(store)
    count = 1 if labels is None else len(labels)
    running = RunningTop.empty(k, len(queries) * count)
    asked = -queries if opponents else queries
    parts = _parts(store, len(queries), lengths, chosen, members)
    running = _run(running, parts, _Scan(asked, k, count))
    values = torch.from_numpy(running.values)
    shape = (len(queries), k) if labels is None else (len(queries), count, k)
    return TopRows(
        positions=torch.from_numpy(running.positions).view(shape),
        values=(-values if opponents else values).view(shape),
        groups=labels,
    )


class _Scan:
    """Finds candidates in parts of the rows."""

    def __init__(self, queries: Tensor, k: int, groups: int) -> None:
        self.queries = queries
        self.k = k
        self.groups = groups
        self.screens: dict[tuple[torch.dtype, bool], Screen] = {}

    def __call__(self, part: Part, thresholds: Tensor) -> Found:
        """Whatever of `part` exceeds the thresholds `[q * g]`, and perhaps more."""
        screen = self.screen(part)
        near = part.near(screen.reach(thresholds.view(len(self.queries), -1).amin(1)))
        if near is None:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        part = near
        products = screen.products(part.values, part.scales)
        scaled = part.scales is not None
        table = thresholds.view(len(self.queries), self.groups)
        if part.groups is not None:
            floors = screen.floors(table, part.longest, scaled=scaled)
            rows, queries = (products > floors.T[part.groups]).nonzero().unbind(1)
            return self._settled(screen, part, rows, queries, thresholds)
        least = table[:, 0]
        if self.k < len(products) and torch.isinf(least).any():
            # Of these rows alone k exceed this, so it is a threshold too.
            kth = products.topk(self.k, dim=0).values[-1].float()
            least = least.maximum(screen.lowered(kth, part.longest, scaled=scaled))
        rows, queries = above(products, screen.floors(least, part.longest, scaled=scaled))
        return self._settled(screen, part, rows, queries, thresholds)

    def _settled(
        self, screen: Screen, part: Part, rows: Tensor, queries: Tensor, thresholds: Tensor
    ) -> Found:
        # One pair alone costs as much as many pairs together.
        if len(rows) > len(part.values) * (1 + len(self.queries) / 64):
            return self._all_pairs(screen, part, thresholds)
        values = screen.settle(part.values, part.scales, rows, queries)
        return self._named(part, rows, queries, values, thresholds)

    def screen(self, part: Part) -> Screen:
        """The queries, ready for rows of this kind."""
        kind = part.values.dtype, part.scales is not None and part.scales.ndim == 2
        if kind not in self.screens:
            self.screens[kind] = Screen.of(self.queries, kind[0], by_column=kind[1])
        return self.screens[kind]

    def _all_pairs(self, screen: Screen, part: Part, thresholds: Tensor) -> Found:
        found = []
        for start in range(0, len(part.values), EXACT_ROWS):
            rows = slice(start, start + EXACT_ROWS)
            scales = None if part.scales is None else part.scales[rows]
            scores = screen.exact(part.values[rows], scales)
            least = torch.full((1, len(self.queries)), -torch.inf)
            if part.groups is None and self.k < len(scores):
                least = scores.topk(self.k, dim=0).values[-1:]
            where, queries = (scores >= least).nonzero().unbind(1)
            values = scores[where, queries]
            found.append(self._named(part, where + start, queries, values, thresholds))
        keys, positions, values = (np.concatenate(each) for each in zip(*found, strict=True))
        return keys, positions, values

    def _named(
        self, part: Part, rows: Tensor, queries: Tensor, values: Tensor, thresholds: Tensor
    ) -> Found:
        keys = queries * self.groups
        if part.groups is not None:
            keys = keys + part.groups[rows]
        # Equal is not enough: thresholds come from earlier rows, which win ties.
        better = values > thresholds[keys]
        keys, rows, values = keys[better], rows[better], values[better]
        return keys.numpy(), part.positions[rows.numpy()], values.numpy()


def above(products: Tensor, floors: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of `products` `[b, q]` that exceed `floors` `[q]`.

    Few do, and comparing all of them would cost a third of the product: the largest of each
    stretch of rows is compared first.
    """
    size, count = products.shape
    whole = size - size % WIDTH
    stretches = products[:whole].view(whole // WIDTH, WIDTH, count)
    hot, queries = (stretches.amax(1) > floors).nonzero().unbind(1)
    one, inside = (stretches[hot, :, queries] > floors[queries][:, None]).nonzero().unbind(1)
    rest, last = (products[whole:] > floors).nonzero().unbind(1)
    return torch.cat([hot[one] * WIDTH + inside, rest + whole]), torch.cat([queries[one], last])


def _run(running: RunningTop, parts: Iterator[Part], scan: _Scan) -> RunningTop:
    """Look at all parts, several at a time, and keep the strongest rows.

    Parts are joined in their order, so thresholds always come from earlier rows.
    """
    pending: list[Found] = []
    waiting: deque[Future[Found]] = deque()
    thresholds = torch.from_numpy(running.thresholds())
    with _workers() as pool:

        def join() -> None:
            nonlocal running, thresholds
            pending.append(waiting.popleft().result())
            if sum(len(keys) for keys, _, _ in pending) >= running.k * running.lists:
                running = _joined(running, pending)
                thresholds = torch.from_numpy(running.thresholds())

        for part in parts:
            # The thresholds are those of the moment when a worker begins, not when it is asked.
            waiting.append(pool.submit(lambda part: scan(part, thresholds), part))
            # Without a threshold everything is a candidate: find one first.
            most = torch.get_num_threads() + 1 if len(running.keys) else 1
            while len(waiting) >= most:
                join()
        while waiting:
            join()
    return _joined(running, pending)


def _joined(running: RunningTop, pending: list[Found]) -> RunningTop:
    if pending:
        running = running.add(*(np.concatenate(each) for each in zip(*pending, strict=True)))
        pending.clear()
    return running


def _workers() -> ThreadPoolExecutor:
    """Threads of one core each: they share nothing, and torch's own would wait for each other."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    pool.submit(int).result()
    # The first worker has also set what later threads of the program begin with.
    torch.set_num_threads(threads)
    return pool


def _parts(
    store: Rows,
    queries: int,
    lengths: Tensor,
    chosen: np.ndarray | None,
    members: np.ndarray | None,
) -> Iterator[Part]:
    """The rows in pieces of work."""
    size = max(WIDTH, min(MOST_ROWS, PAIRS // queries))
    for block in track(store.blocks(size), "search"):
        yield Part(
            block.values,
            block.scales,
            np.arange(block.rows.start, block.rows.stop),
            lengths[block.rows],
            None if members is None else torch.from_numpy(members[block.rows]),
            None if chosen is None else torch.from_numpy(chosen[block.rows]),
        )


class _Columns:
    """Columns of a store, each read once."""

    def __init__(self, store: Rows) -> None:
        self.store = store
        self.read: dict[str, np.ndarray] = {}

    def __call__(self, name: str) -> np.ndarray:
        if name not in self.read:
            self.read[name] = self.store.column(name)
        return self.read[name]


def chosen_rows(store: Rows, filter: Filter | np.ndarray) -> np.ndarray:
    """Which rows take part, bool `[n]`."""
    if not isinstance(filter, np.ndarray):
        return filter.matches(_Columns(store), slice(0, len(store)))
    if filter.dtype != bool or filter.shape != (len(store),):
        raise DataError(
            f"filter is {filter.dtype} of shape {filter.shape}: give one bool for each of the "
            f"{len(store)} rows, or a condition such as Equals('label', 3)"
        )
    return filter


def _groups(
    store: Rows, group: str | np.ndarray | None, chosen: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Labels of the groups `[g]`, and the group of each row `[n]`."""
    if group is None:
        return None, None
    values = store.column(group) if isinstance(group, str) else np.asarray(group)
    if values.shape != (len(store),):
        raise DataError(
            f"group has shape {values.shape}: give one label for each of the {len(store)} rows"
        )
    labels = np.unique(values if chosen is None else values[chosen])
    # Labels of rows that a filter leaves out need no place: these rows are never looked at.
    return labels, np.searchsorted(labels, values)


def _require_rows(
    k: int,
    rows: int,
    labels: np.ndarray | None,
    members: np.ndarray | None,
    chosen: np.ndarray | None,
) -> None:
    where = "there are" if chosen is None else "the filter leaves"
    if not 1 <= k <= rows:
        raise DataError(f"k is {k} and {where} {rows} rows: choose 1 to {rows}, or filter less")
    if labels is None or members is None:
        return
    counts = np.bincount(members if chosen is None else members[chosen], minlength=len(labels))
    if counts.min() < k:
        raise DataError(
            f"k is {k} and group {labels[counts.argmin()].item()!r} has {counts.min()} rows: "
            "choose a smaller k, or filter small groups out"
        )


def checked_queries(store: Rows, queries: Tensor) -> Tensor:
    """Queries `[q, d]`, or a reason why they cannot be asked."""
    queries = queries[None] if queries.ndim == 1 else queries
    if queries.ndim != 2 or len(queries) == 0:
        raise DataError(f"queries have shape {tuple(queries.shape)}: expected [q, d], q at least 1")
    if queries.shape[1] != store.dimension:
        raise MismatchError(
            f"queries have {queries.shape[1]} columns and the rows have {store.dimension}: were "
            "they made with another projection?"
        )
    queries = queries.detach().cpu()
    require_finite(queries, "queries")
    return queries


def row_lengths(store: Rows) -> Tensor:
    """`[n]` lengths of the rows, which are known to be finite then."""
    lengths = torch.as_tensor(store.norms)
    require_finite(lengths[:, None], "stored rows")
    return lengths
