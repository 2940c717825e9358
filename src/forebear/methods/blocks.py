"""Scores of all pairs on disk, block by block, where the matrix would not fit into memory."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from forebear.data import Data
from forebear.errors import DataError, FormatError
from forebear.executors import Pieces
from forebear.methods.belonging import facts_of
from forebear.methods.fitted import Candidates, Fitted, Piece, block_name, strongest
from forebear.methods.settings import settings_of
from forebear.search import RunningQuantiles
from forebear.types import Provenance, TopK, check_k, read_json, write_json

INDEX = "blocks.json"


def score_blocks(fitted: Fitted, queries: Data, folder: str | Path) -> "ScoreBlocks":
    """Score all pairs into a folder, where the executor of `fitted` says.

    A block is a group of queries that fits into memory and a stretch of the training set. Its file
    is its own marker: what is there is not computed again.

    Raises:
        MismatchError: the folder holds scores of another model, loss, method, or other data.
        NonFiniteError: a score is NaN or infinite.
    """
    facts = {
        "model": fitted.model_hash,
        "train": fitted.train.fingerprint,
        "queries": queries.fingerprint,
        "settings": settings_of(fitted.method),
        **facts_of(fitted.method, fitted.task),
        "batch_size": fitted.batch_size,  # which targets are drawn depends on it
    }
    kept = Pieces(folder, facts, "scores")
    places, dtype = [], torch.float32
    for rows, columns, values in fitted.blocks(queries, kept):
        fitted.require_finite(values, queries.ids[rows])
        places.append([rows.start, rows.stop, columns.start, columns.stop])
        dtype = values.dtype
    index = {
        "places": places,
        "dtype": str(dtype).removeprefix("torch."),
        "query_ids": queries.ids.tolist(),
        "train_ids": fitted.train.ids.tolist(),
        "provenance": asdict(fitted._provenance(queries)),
    }
    if fitted.executor is None or fitted.executor.leads:
        write_json(Path(folder) / INDEX, index)
    return ScoreBlocks(Path(folder), index)


@dataclass(frozen=True)
class ScoreBlocks:
    """Scores `[query, train]` in a folder; positive = proponent.

    Attributes:
        folder: with a safetensors file for each block.
        index: where blocks stand, ids, and where the scores come from.
    """

    folder: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "ScoreBlocks":
        """What `score_to` wrote.

        Raises:
            FormatError: it was stopped halfway, or the index is damaged.
        """
        path = Path(folder) / INDEX
        if not path.exists():
            raise FormatError(
                f"{folder} has no {INDEX}: it holds no scores, or they were stopped halfway; call "
                "score_to again to go on"
            )
        index = read_json(path)
        if not {"places", "dtype", "query_ids", "train_ids", "provenance"} <= set(index):
            raise FormatError(f"{path} is damaged: call score_to again, which keeps the blocks")
        return cls(Path(folder), index)

    @property
    def query_ids(self) -> np.ndarray:
        """`[q]`."""
        return np.asarray(self.index["query_ids"])

    @property
    def train_ids(self) -> np.ndarray:
        """`[n]`."""
        return np.asarray(self.index["train_ids"])

    @property
    def shape(self) -> tuple[int, int]:
        """Number of queries and of training examples."""
        return len(self.index["query_ids"]), len(self.index["train_ids"])

    @property
    def provenance(self) -> Provenance:
        """Method, settings, units, coverage and fingerprints."""
        return Provenance(**self.index["provenance"])

    def blocks(self) -> Iterator[Piece]:
        """Query positions, training positions and scores `[g, b]` of each block.

        Raises:
            FormatError: a block is missing or damaged.
        """
        for rows, columns in self._places():
            with self._opened(rows, columns) as file:
                yield rows, columns, file.get_tensor("scores")

    def rows(self, ids: Any) -> Tensor:
        """Scores `[m, n]` of some queries; nothing else is read.

        Raises:
            DataError: an id is not there.
        """
        known = {each: place for place, each in enumerate(self.index["query_ids"])}
        wanted = np.asarray(ids).reshape(-1).tolist()
        for each in wanted:
            if each not in known:
                raise DataError(f"there are no scores of query {each!r}: see query_ids")
        positions = [known[each] for each in wanted]
        found = torch.empty(len(wanted), self.shape[1], dtype=self._dtype)
        for rows, columns in self._places():
            inside = [(i, p - rows.start) for i, p in enumerate(positions) if p in _range(rows)]
            if inside:
                with self._opened(rows, columns) as file:
                    scores = file.get_slice("scores")
                    for i, row in inside:
                        found[i, columns] = scores[row : row + 1][0]
        return found

    def top(self, k: int = 10, *, opponents: bool = False) -> TopK:
        """The `k` strongest proponents of each query, or opponents; a block at a time.

        Raises:
            DataError: `k` is below one or above the number of training examples.
        """
        check_k(k, self.shape[1])
        sign = -1.0 if opponents else 1.0
        values, positions = strongest(self._candidates(sign), k)
        return TopK(
            ids=self.train_ids[positions.numpy()],
            values=sign * values,
            query_ids=self.query_ids,
            opponents=opponents,
            provenance=self.provenance,
        )

    def quantiles(self) -> RunningQuantiles:
        """Of the scores of each query, in the order of `query_ids`; 256 KB a query."""
        counts = RunningQuantiles.empty(self.shape[0]).counts
        for rows, _, scores in self.blocks():
            counts[rows] = RunningQuantiles(counts[rows]).add(scores).counts
        return RunningQuantiles(counts)

    def to_npy(self, path: str | Path) -> np.ndarray:
        """Write the whole matrix as one `.npy` file, and return it mapped into memory."""
        dtype = torch.empty(0, dtype=self._dtype).numpy().dtype
        matrix = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=self.shape)
        for rows, columns, scores in self.blocks():
            matrix[rows, columns] = scores.numpy()
        matrix.flush()
        return matrix

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.index["dtype"])

    def _candidates(self, sign: float) -> Iterator[Candidates]:
        for rows, columns, scores in self.blocks():
            yield (
                rows,
                sign * scores,
                torch.arange(columns.start, columns.stop).expand(scores.shape),
            )

    def _places(self) -> Iterator[tuple[slice, slice]]:
        for first, last, start, stop in self.index["places"]:
            yield slice(first, last), slice(start, stop)

    def _opened(self, rows: slice, columns: slice) -> Any:
        path = self.folder / f"{block_name(rows, columns)}.safetensors"
        try:
            return safe_open(path, framework="pt")
        except Exception as error:  # safetensors has several kinds, and no parent of its own
            raise FormatError(
                f"{path} is missing or damaged: delete it and call score_to again"
            ) from error


def _range(rows: slice) -> range:
    return range(rows.start, rows.stop)
