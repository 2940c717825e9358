"""Questions to a store and their answers: what the command line and the service have in common."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.data import Data
from forebear.errors import DataError, TaskError
from forebear.index.base import Index
from forebear.methods.features import query_features
from forebear.methods.fitted import Fitted, version
from forebear.search import Filter, TopRows, ranks, search_exact
from forebear.service.conditions import kind_of, parse
from forebear.store import Block, Store
from forebear.types import Provenance, TopK


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked about vectors or about a row.

    Attributes:
        k: rows of each query, and of each group.
        where: conditions on columns, such as `label=3`; rows must meet all of them.
        group: a column: the `k` strongest rows of each of its values are wanted.
        opponents: the lowest scores instead of the highest.
    """

    k: int = 10
    where: Sequence[str] = ()
    group: str | None = None
    opponents: bool = False


@dataclass(frozen=True)
class Elsewhere:
    """Rows other than one."""

    position: int
    also: Filter | None = None

    def matches(self, column: Any, rows: slice) -> np.ndarray:
        """All that meet the other condition, but for the one."""
        found = np.arange(rows.start, rows.stop) != self.position
        return found if self.also is None else found & self.also.matches(column, rows)


@dataclass(frozen=True)
class Searcher:
    """A store that answers questions, exactly or by an index.

    Attributes:
        store: the rows.
        fitted: the method they were made with, from `load_fitted`; without one only vectors and
            rows can be asked about.
        index: where to look; every row when left out.
        texts: what people call rows, by id.
        form: a batch of queries, which those that come as JSON have the form of.
    """

    store: Store
    fitted: Fitted | None = None
    index: Index | None = None
    texts: Mapping[Any, str] = field(default_factory=dict)
    form: Any = None
    # A model has hooks while gradients are taken: one thread at a time.
    lock: Any = field(default_factory=Lock, repr=False)

    def vectors(self, queries: Data) -> Tensor:
        """`[q, d]` vectors whose products with rows are the scores of queries.

        Raises:
            TaskError: the method is not known here.
        """
        if self.fitted is None:
            raise TaskError(
                "queries need the model: name the FILE.py that defines task() and queries()"
            )
        with self.lock:
            return query_features(self.fitted, queries)

    def search(self, vectors: Tensor, question: Question) -> TopRows:
        """The strongest rows of vectors `[q, d]`, or those of each group.

        Raises:
            UnknownNameError: a column does not exist.
            DataError: there are fewer rows than asked for, or a condition is not understood.
            MismatchError: rows have another dimension.
        """
        return self._search(vectors, question, parse(question.where, self._columns))

    def neighbours(self, position: int, question: Question) -> TopRows:
        """The other rows with the largest products with the row at `position`."""
        vector = self.store.rows([position])
        filter = parse(question.where, self._columns)
        if self.index is None:
            return self._search(vector, question, Elsewhere(position, filter))
        # Not every index can leave out one position: it is asked for one row more.
        own = slice(position, position + 1)
        if filter is not None and not filter.matches(self.rows.column, own)[0]:
            return self._search(vector, question, filter)
        found = self._search(vector, replace(question, k=question.k + 1), filter)
        others = found.positions != position
        others[:, -1] &= ~others.all(1)  # where it is not among them, the last is too many
        positions, values = (part[others][None] for part in (found.positions, found.values))
        return replace(found, positions=positions, values=values)

    def _search(self, vectors: Tensor, question: Question, filter: Filter | None) -> TopRows:
        k, opponents = question.k, question.opponents
        if question.group is not None:
            kind_of(question.group, self._columns)
            if self.index is not None:
                raise DataError(
                    f"groups need every row to be looked at, and index {self.index.kind!r} does "
                    "not: leave out one of the two"
                )
        if self.index is not None:
            return self.index.search(vectors, k, filter=filter, opponents=opponents)
        return search_exact(
            self.rows, vectors, k, filter=filter, group=question.group, opponents=opponents
        )

    @cached_property
    def rows(self) -> "Columned":
        """The store, whose columns are read once."""
        return Columned(self.store)

    @property
    def _columns(self) -> Mapping[str, Any]:
        return self.store.manifest.columns

    def position(self, text: str | int) -> int:
        """Where the row with an id stands.

        Raises:
            DataError: there is none.
        """
        name: Any = str(text)
        if self.store.manifest.ids == "integer":
            try:
                name = int(text)
            except ValueError:
                raise DataError(f"id {text!r} is not in the store: its ids are integers") from None
        return int(self.store.positions([name])[0])

    def places(self, vectors: Tensor, found: TopRows) -> Tensor:
        """`[q, m]` share of all rows that do not score higher than each of those found.

        One more pass over the rows.
        """
        above = ranks(self.rows, vectors, found.values.reshape(len(vectors), -1))
        return 1 - above / len(self.store)

    def listed(self, found: TopRows) -> list[list[dict[str, Any]]]:
        """For each query its rows: rank, id, score, group, columns and text."""
        count = len(found.positions)
        positions = found.positions.reshape(count, -1).numpy()
        values = found.values.reshape(count, -1)
        return [
            [
                {"rank": i % found.positions.shape[-1] + 1, "score": score}
                | self._group(found, i)
                | self.about(int(position))
                for i, (position, score) in enumerate(zip(row, scores.tolist(), strict=True))
            ]
            for row, scores in zip(positions, values, strict=True)
        ]

    def told(self, found: TopRows, names: Sequence[Any], queries: str = "") -> dict[str, Any]:
        """An answer as JSON has it.

        Args:
            found: what was found.
            names: of the queries.
            queries: fingerprint of the queries.
        """
        exact = getattr(found, "exact", None)  # an index may have looked at every row after all
        exact = [self.index is None] * len(names) if exact is None else plain(exact)
        lists = zip(names, exact, self.listed(found), strict=True)
        return {
            "answers": [
                {"query": plain(name), "exact": each, "rows": rows} for name, each, rows in lists
            ],
            "search": "exact" if self.index is None else self.index.kind,
            "recall": None if self.index is None else str(self.index.recall),
            "provenance": asdict(self.provenance(queries)),
        }

    def _group(self, found: TopRows, i: int) -> dict[str, Any]:
        if found.groups is None:
            return {}
        return {"group": plain(found.groups[i // found.positions.shape[-1]])}

    def about(self, position: int) -> dict[str, Any]:
        """Id, columns and text of a row."""
        name = plain(self.store.ids[position])
        columns = {column: plain(self.rows.column(column)[position]) for column in self._columns}
        found = {"id": name, "columns": columns}
        return found | ({"text": str(self.texts[name])} if name in self.texts else {})

    def top(
        self, found: TopRows, names: Sequence[Any], queries: str = "", *, opponents: bool = False
    ) -> TopK:
        """An answer as the methods give it; groups stand one after the other."""
        count = len(found.positions)
        return TopK(
            ids=self.store.ids[found.positions.reshape(count, -1).numpy()],
            values=found.values.reshape(count, -1),
            query_ids=np.asarray(names),
            opponents=opponents,
            provenance=self.provenance(queries),
        )

    def provenance(self, queries: str = "") -> Provenance:
        """Where scores come from.

        Args:
            queries: fingerprint of the queries; products of rows with each other only rank.
        """
        about, fitted = self.store.manifest, self.fitted if queries else None
        return Provenance(
            method=about.method,
            settings={**about.settings, **(fitted.details() if fitted else {})},
            units=fitted.units if fitted else "ranking",
            coverage=fitted.coverage if fitted else None,
            model=about.model,
            train=about.train,
            queries=queries,
            seed=about.seed,
            version=version(),
            loss=about.loss,
            measure=fitted.task.facts()["measure"] if fitted else None,
        )

    def facts(self) -> dict[str, Any]:
        """What the store is and what can be asked, ready for JSON."""
        about = self.store.manifest
        return {
            "store": self.store.folder.resolve().name,
            "rows": about.rows,
            "dimension": about.dimension,
            "dtype": about.dtype,
            "ids": about.ids,
            "columns": {name: column.dtype for name, column in about.columns.items()},
            "method": about.method,
            "settings": about.plain()["settings"],
            "model": about.model,
            "train": about.train,
            "loss": about.loss,
            "version": about.version,
            "search": "exact" if self.index is None else self.index.kind,
            "recall": None if self.index is None else str(self.index.recall),
            "asks": ["vector", "row", *(["query"] if self.fitted is not None else [])],
        }


@dataclass(frozen=True)
class Columned:
    """A store as search needs it, whose columns are read from the disk once and not each time."""

    store: Store
    read: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.store)

    @property
    def dimension(self) -> int:
        """Numbers in a row."""
        return self.store.dimension

    @property
    def norms(self) -> Tensor:
        """`[n]` lengths of the rows."""
        return self.store.norms

    def blocks(self, rows_at_a_time: int) -> Iterator[Block]:
        """All rows in order."""
        return self.store.blocks(rows_at_a_time)

    def column(self, name: str) -> np.ndarray:
        """`[n]` values of a column."""
        if name not in self.read:
            self.read[name] = self.store.column(name)
        return self.read[name]


def plain(value: Any) -> Any:
    """A number or text of numpy as JSON has it; what is no number is null."""
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inputs(given: Any, like: Any) -> Any:
    """A batch from JSON, in the form of another batch: a list for each column, or a dict of them.

    Raises:
        DataError: it has other columns, or other numbers than its model takes.
    """
    if isinstance(like, Tensor):
        return _column("the query", given, like)
    if hasattr(like, "keys"):
        if not isinstance(given, dict) or set(given) != set(like.keys()):
            raise DataError(f"the query must be an object with {', '.join(map(str, like.keys()))}")
        return {key: _column(repr(key), given[key], like[key]) for key in like.keys()}  # noqa: SIM118
    if not isinstance(given, list) or len(given) != len(like):
        raise DataError(f"the query must be a list of {len(like)} columns, each of all queries")
    columns = zip(given, like, strict=True)
    return tuple(_column(f"column {i}", one, other) for i, (one, other) in enumerate(columns))


def _column(name: str, given: Any, like: Any) -> Tensor:
    if not isinstance(like, Tensor):
        raise DataError(f"{name} of the queries is no tensor: it cannot be asked for as JSON")
    try:
        values = torch.tensor(given)
    except (ValueError, TypeError, RuntimeError):
        raise DataError(
            f"{name} of the query is not a list of numbers, all rows of one length"
        ) from None
    if values.is_floating_point() and not like.is_floating_point():
        raise DataError(f"{name} of the query must be whole numbers")
    wrong = values.shape[1:] != like.shape[1:] if like.is_floating_point() else False
    if values.ndim != like.ndim or wrong:
        raise DataError(
            f"{name} of the query has shape {tuple(values.shape)}: it must be "
            f"[queries{''.join(f', {size}' for size in like.shape[1:])}]"
        )
    return values.to(like.dtype)
