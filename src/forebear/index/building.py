"""Building and opening an index beside its store, with its recall measured."""

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from forebear.errors import (
    DataError,
    FormatError,
    NumericalWarning,
    UnknownNameError,
    unknown_name,
)
from forebear.index.base import Kind, Recall, Trial
from forebear.index.files import (
    NAME,
    Description,
    described_files,
    fingerprint,
    folder_of,
    read_description,
    remedy_of,
)
from forebear.index.searcher import Searcher, shares_found
from forebear.search import search_exact
from forebear.search.exact import checked_queries
from forebear.store import Store
from forebear.store.files import explained
from forebear.store.lock import Lock

KINDS = {
    "ivf": "faiss:InvertedLists",
    "pq": "faiss:ProductCodes",
    "hnsw": "faiss:Graph",
    "qdrant": "qdrant:Collection",
}
"""Kinds of indexes: module and class of each configuration."""


@dataclass(frozen=True)
class StoredIndex(Searcher):
    """An index that lives in the folder of its store.

    Attributes:
        about: what its folder says of it.
    """

    about: Description

    @property
    def kind(self) -> str:
        """Its name in `KINDS`."""
        return self.about.kind

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it was built with, defaults included."""
        return self.about.settings

    @property
    def recall(self) -> Recall:
        """Measured against exact search when it was built."""
        return self.about.recall

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Efforts that were measured when it was built; the last is the one in use."""
        return self.about.trials

    @property
    def folder(self) -> Path:
        """Where it is; it may be deleted and built again."""
        return folder_of(self.store, self.kind)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind} of {self.store!r}: {self.recall})"


def build(
    store: Store,
    kind: str,
    *,
    queries: Tensor | None = None,
    sample: int = 64,
    k: int = 100,
    seed: int = 0,
    recall_at_least: float | None = None,
    **settings: Any,
) -> StoredIndex:
    """Build an index in the folder of a store, in place of one of the same kind.

    Args:
        store: the rows.
        kind: one of `KINDS`.
        queries: `[q, d]` to measure recall with; rows of the store when left out. Queries of a
            method with a curvature are distributed differently from rows: give some.
        sample: rows that recall is measured with when there are no queries.
        k: of the recall; the number of rows where there are fewer.
        seed: of that sample, and of the rows from which centres are found.
        recall_at_least: double the effort of a search until the recall is reached.
        settings: of the kind.

    Raises:
        UnknownNameError: the kind or a setting does not exist.
        DataError: a setting has a value that cannot be, or the store has too few rows.
        MissingDependencyError: the kind's library is not installed.
        ForebearError: another process is building the same.
        OSError: the folder cannot be written to.
    """
    config = _configured(kind, settings)
    if sample < 1 or k < 1:
        raise DataError(f"sample is {sample} and k is {k}: both must be at least 1")
    if recall_at_least is not None and not 0 < recall_at_least <= 1:
        raise DataError(f"recall_at_least is {recall_at_least}: choose a share up to 1, as 0.9")
    asked = _sampled(store, sample, seed) if queries is None else checked_queries(store, queries)
    with _building(folder_of(store, kind)) as folder:
        config, handle = config.build(store, folder, seed)
        searcher = Searcher(store, config, handle)
        config, shares, trials = _tuned(searcher, asked, min(k, len(store)), recall_at_least)
        about = Description(
            kind=kind,
            settings=asdict(config),  # type: ignore[call-overload]
            store=fingerprint(store),
            rows=len(store),
            libraries={name: version(name) for name in config.libraries},
            files=described_files(folder, config.files),
            recall=Recall.of(shares, min(k, len(store)), sampled=queries is None),
            trials=trials,
        )
        about.write(folder)
    return StoredIndex(store, config, handle, about)


def open(store: Store, kind: str) -> StoredIndex:
    """Open the index of a kind that was built for a store.

    Raises:
        UnknownNameError: there is no such kind.
        FormatError: it was not built or not finished, or it is damaged.
        MismatchError: the store has changed since.
        MissingDependencyError: the kind's library is not installed.
    """
    _kind(kind)
    about = read_description(store, kind)
    try:
        config = _configured(kind, about.settings)
    except (DataError, UnknownNameError) as error:
        path = folder_of(store, kind) / NAME
        raise FormatError(f"{path} is damaged ({error}): {remedy_of(kind)}") from error
    return StoredIndex(store, config, config.open(store, folder_of(store, kind)), about)


def _kind(kind: str) -> type:
    if kind not in KINDS:
        raise unknown_name("kind of index", kind, KINDS)
    module, name = KINDS[kind].split(":")
    return getattr(import_module(f"forebear.index.{module}"), name)


def _configured(kind: str, settings: Mapping[str, Any]) -> Kind:
    make = _kind(kind)
    known = [field.name for field in fields(make)]
    for name in settings:
        if name not in known:
            raise unknown_name(f"setting of {kind}", name, known)
    return make(**settings)


@contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """The folder of an index, for this process alone; without a description until that is written.

    What stands there is an earlier build's: the kind knows what it can go on with.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise explained(error, folder) from error
    lock = Lock(folder)
    lock.take()
    try:
        (folder / NAME).unlink(missing_ok=True)
        yield folder
    finally:
        lock.release()


def _sampled(store: Store, sample: int, seed: int) -> Tensor:
    chosen = np.random.default_rng(seed).choice(len(store), min(sample, len(store)), replace=False)
    return store.rows(np.sort(chosen))


def _tuned(
    searcher: Searcher, queries: Tensor, k: int, recall_at_least: float | None
) -> tuple[Kind, np.ndarray, tuple[Trial, ...]]:
    """Settings that reach a recall, or the first; shares found of each query; what was measured."""
    start = time.perf_counter()
    exact = search_exact(searcher.store, queries, k)
    exact_seconds = time.perf_counter() - start
    trials: list[Trial] = []
    config = searcher.config
    while True:
        start = time.perf_counter()
        found = replace(searcher, config=config).search(queries, k)
        seconds = time.perf_counter() - start
        shares = shares_found(found, exact)
        effort = {name: getattr(config, name) for name in config.effort}
        trials.append(Trial(effort, float(shares.mean()), seconds, exact_seconds))
        if recall_at_least is None or shares.mean() >= recall_at_least:
            return config, shares, tuple(trials)
        harder = config.harder(len(searcher.store))
        if harder is None:
            warnings.warn(
                f"recall is {shares.mean():.3f} with the most effort this index can make, and "
                f"{recall_at_least} was asked for: build it with other settings or search exactly",
                NumericalWarning,
                stacklevel=4,
            )
            return config, shares, tuple(trials)
        config = harder
