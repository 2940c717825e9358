"""Indexes that faiss keeps in memory, with inner products (Douze et al. 2024).

Vectors are in bfloat16, or in codes of a byte or less for eight numbers: what faiss makes of their
values decides which rows it proposes, and nothing else.
"""

import os
from dataclasses import dataclass, replace
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from forebear.errors import DataError, FormatError, MissingDependencyError
from forebear.index.base import Chosen, require_positive
from forebear.progress import track
from forebear.store import Store, decode
from forebear.store.files import PARTIAL, explained, sync_folder

FILE = "index.faiss"
STEP = 2**14  # rows added at a time
ROUNDS = 10  # of k-means: more change recall by less than its interval
FOR_EACH = 40  # rows for each centre that k-means looks for
MOST_CODE_ROWS = 2**16  # from which product codes are learnt
MOST_REFINE = 128


@dataclass(frozen=True, kw_only=True)
class InvertedLists:
    """Rows in lists around centres; the lists nearest to a query are searched.

    `IndexIVFScalarQuantizer` of faiss, in bfloat16, after Sivic & Zisserman (2003).

    Attributes:
        lists: number of centres (nlist); 4 √n when left out.
        probes: lists that are searched for a query (nprobe).
        refine: rows re-scored exactly for each one wanted.
    """

    libraries: ClassVar = ("faiss-cpu",)
    files: ClassVar = (FILE,)
    effort: ClassVar = ("probes",)

    lists: int | None = None
    probes: int = 64
    refine: float = 1.25

    def __post_init__(self) -> None:
        require_positive(self, "lists", "probes", "refine")

    def build(self, store: Store, folder: Path, seed: int) -> tuple[Self, Any]:
        """Find centres from a sample of rows, then add all rows in blocks."""
        config = _with_lists(self, len(store))
        faiss = _faiss()
        metric = faiss.METRIC_INNER_PRODUCT
        centres = faiss.IndexFlat(store.dimension, metric)
        kind = faiss.ScalarQuantizer.QT_bf16
        index = faiss.IndexIVFScalarQuantizer(
            centres, store.dimension, config.lists, kind, metric, False
        )
        _set_clustering(index, seed)
        _fill(index, store, folder, sample=FOR_EACH * (config.lists or 1), seed=seed)
        return config, index

    def open(self, store: Store, folder: Path) -> Any:
        """Read it into memory."""
        return _read(store, folder)

    def propose(
        self, handle: Any, queries: np.ndarray, count: int, chosen: Chosen | None
    ) -> np.ndarray:
        """Look through the lists nearest to each query."""
        return _probed(handle, queries, count, chosen, _faiss().SearchParametersIVF, self.probes)

    def harder(self, rows: int) -> Self | None:
        """Twice the probes, until there is no further list."""
        if self.probes >= (self.lists or rows):
            return None
        return replace(self, probes=min(2 * self.probes, self.lists or rows))


@dataclass(frozen=True, kw_only=True)
class ProductCodes:
    """Inverted lists of product codes: small, and re-scored from the store.

    `IndexIVFPQ` of faiss, after Jégou et al. (2011): the differences to the centre of the list are
    cut into parts, each replaced by the nearest of 2^bits learnt ones.

    Attributes:
        parts: of a row (m); one for eight numbers when left out.
        bits: of the code of a part, at most 8.
        lists: number of centres (nlist); 4 √n when left out.
        probes: lists that are searched for a query (nprobe).
        refine: rows re-scored exactly for each one wanted: codes alone order rows coarsely.
    """

    libraries: ClassVar = ("faiss-cpu",)
    files: ClassVar = (FILE,)
    effort: ClassVar = ("probes", "refine")

    parts: int | None = None
    bits: int = 8
    lists: int | None = None
    probes: int = 64
    refine: float = 10.0

    def __post_init__(self) -> None:
        require_positive(self, "parts", "bits", "lists", "probes", "refine")
        if self.bits > 8:
            raise DataError(f"bits is {self.bits}: choose 1 to 8")

    def build(self, store: Store, folder: Path, seed: int) -> tuple[Self, Any]:
        """Learn centres and codes from a sample of rows, then add all rows in blocks."""
        parts = self.parts or ceil(store.dimension / 8)
        if parts > store.dimension:
            raise DataError(
                f"parts is {parts} and rows have {store.dimension} numbers: choose less"
            )
        if len(store) < 2**self.bits:
            raise DataError(
                f"{2**self.bits} codes cannot be learnt from {len(store)} rows: choose fewer bits, "
                "or search exactly, which is faster for so few"
            )
        config = replace(_with_lists(self, len(store)), parts=parts)
        faiss = _faiss()
        metric = faiss.METRIC_INNER_PRODUCT
        width = ceil(store.dimension / parts) * parts  # faiss wants parts of one width
        index = faiss.IndexIVFPQ(
            faiss.IndexFlat(width, metric), width, config.lists, parts, self.bits, metric
        )
        _set_clustering(index, seed)
        index.pq.cp.seed, index.pq.cp.min_points_per_centroid = seed, 1
        sample = max(FOR_EACH * (config.lists or 1), MOST_CODE_ROWS)
        _fill(index, store, folder, sample=sample, seed=seed)
        return config, index

    def open(self, store: Store, folder: Path) -> Any:
        """Read it into memory."""
        return _read(store, folder)

    def propose(
        self, handle: Any, queries: np.ndarray, count: int, chosen: Chosen | None
    ) -> np.ndarray:
        """Look through the codes in the lists nearest to each query."""
        return _probed(handle, queries, count, chosen, _faiss().IVFPQSearchParameters, self.probes)

    def harder(self, rows: int) -> Self | None:
        """Twice the probes, and when there is no further list twice the candidates.

        Scoring candidates again costs more than looking through lists.
        """
        lists = self.lists or rows
        if self.probes < lists:
            return replace(self, probes=min(2 * self.probes, lists))
        if self.refine < MOST_REFINE:
            return replace(self, refine=min(2 * self.refine, MOST_REFINE))
        return None


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A graph of near rows in layers, walked towards a query.

    `IndexHNSWSQ` of faiss, in bfloat16, after Malkov & Yashunin (2018). With several threads the
    graph depends on which was first.

    Attributes:
        links: of a row to others (M).
        construction: rows kept in sight while a row is added (efConstruction).
        breadth: rows kept in sight during a search (efSearch).
        refine: rows re-scored exactly for each one wanted.
    """

    libraries: ClassVar = ("faiss-cpu",)
    files: ClassVar = (FILE,)
    effort: ClassVar = ("breadth",)

    links: int = 16
    construction: int = 100
    breadth: int = 256
    refine: float = 1.25

    def __post_init__(self) -> None:
        require_positive(self, "links", "construction", "breadth", "refine")

    def build(self, store: Store, folder: Path, seed: int) -> tuple[Self, Any]:
        """Add all rows in blocks."""
        faiss = _faiss()
        index = faiss.IndexHNSWSQ(
            store.dimension, faiss.ScalarQuantizer.QT_bf16, self.links, faiss.METRIC_INNER_PRODUCT
        )
        index.hnsw.efConstruction = self.construction
        _fill(index, store, folder, sample=1, seed=seed)
        return self, index

    def open(self, store: Store, folder: Path) -> Any:
        """Read it into memory."""
        return _read(store, folder)

    def propose(
        self, handle: Any, queries: np.ndarray, count: int, chosen: Chosen | None
    ) -> np.ndarray:
        """Walk the graph."""
        parameters = _faiss().SearchParametersHNSW
        breadth = max(self.breadth, count)
        breadth = breadth if chosen is None else chosen.harder(breadth)
        return _searched(handle, queries, count, chosen, parameters, efSearch=breadth)

    def harder(self, rows: int) -> Self | None:
        """Twice the breadth, until it is all rows."""
        return replace(self, breadth=min(2 * self.breadth, rows)) if self.breadth < rows else None


def _faiss() -> Any:
    try:
        faiss = import_module("faiss")
    except ImportError:
        raise MissingDependencyError(
            "indexes of kind ivf, pq and hnsw need faiss: pip install 'forebear[index]'"
        ) from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _with_lists(config: Any, rows: int) -> Any:
    """With a number of lists, and no more probes than there are."""
    lists = config.lists or max(1, min(round(4 * rows**0.5), rows // 8))
    if lists > rows:
        raise DataError(f"lists is {lists} and there are {rows} rows: choose less")
    return replace(config, lists=lists, probes=min(config.probes, lists))


def _set_clustering(index: Any, seed: int) -> None:
    index.cp.seed, index.cp.niter = seed, ROUNDS
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, FOR_EACH


def _fill(index: Any, store: Store, folder: Path, *, sample: int, seed: int) -> None:
    """Train with a sample of rows, add all of them, and write the file."""
    count = min(sample, len(store))
    chosen = np.random.default_rng(seed).choice(len(store), count, replace=False)
    index.train(_padded(store.rows(np.sort(chosen)).numpy(), index.d))
    for block in track(store.blocks(STEP), "index", total=store.manifest.shards):
        index.add(_padded(decode(block.values, block.scales).numpy(), index.d))
    _write(index, folder / FILE)


def _padded(rows: np.ndarray, width: int) -> np.ndarray:
    """With zeros at the end, which change no product."""
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1]))) if width > rows.shape[1] else rows


def _probed(
    index: Any,
    queries: np.ndarray,
    count: int,
    chosen: Chosen | None,
    parameters: Any,
    probes: int,
) -> np.ndarray:
    """Rows found in the lists nearest to each query, more of them where a filter leaves few."""
    probes = min(probes if chosen is None else chosen.harder(probes), index.nlist)
    return _searched(index, queries, count, chosen, parameters, nprobe=probes)


def _searched(
    index: Any,
    queries: np.ndarray,
    count: int,
    chosen: Chosen | None,
    parameters: Any,
    **effort: int,
) -> np.ndarray:
    selector = None
    if chosen is not None:
        selector = _faiss().IDSelectorBitmap(np.packbits(chosen.mask, bitorder="little"))
    asked = _padded(np.ascontiguousarray(queries), index.d)
    return index.search(asked, count, params=parameters(sel=selector, **effort))[1]


def _write(index: Any, path: Path) -> None:
    """Through a temporary name, so that the file is the old, the new or absent."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        _faiss().write_index(index, str(partial))
        handle = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise explained(error, path) from error
    except RuntimeError as error:  # what faiss makes of a full disk
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: is the disk full? faiss: {error}") from error


def _read(store: Store, folder: Path) -> Any:
    try:
        index = _faiss().read_index(str(folder / FILE))
    except RuntimeError as error:
        raise FormatError(
            f"{folder / FILE} cannot be read by this version of faiss ({error}): build it again"
        ) from error
    if index.ntotal != len(store):
        raise FormatError(
            f"{folder / FILE} holds {index.ntotal} of {len(store)} rows: build it again"
        )
    return index
