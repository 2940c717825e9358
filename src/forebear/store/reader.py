"""Reading a store: mapped into memory, in order or at random."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from forebear.errors import DataError, FormatError
from forebear.store.manifest import Manifest
from forebear.store.rows import decode, named
from forebear.store.shards import Shard, path_of

MAPPED = 8192
"""Shards that stay mapped; the kernel allows a process 65,530 maps of all kinds."""


@dataclass(frozen=True)
class Block:
    """Some consecutive rows as they are kept.

    Attributes:
        rows: their positions in the store.
        values: `[b, k]` in the stored type: a view of the mapped file, not a copy.
        scales: `[b]` what the values of each row are to be multiplied with, or None.
    """

    rows: slice
    values: Tensor
    scales: Tensor | None


class Store:
    """Rows on disk, one for each training example, with ids, norms and columns.

    Nothing but the manifest is read on opening; rows are read when they are touched, and a store
    larger than memory is fine.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shard = lru_cache(MAPPED)(lambda number: Shard.open(folder, number, manifest))

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a complete store.

        Raises:
            FormatError: it is no store, is damaged or from a newer version, or lacks shards.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        there = {path.name for path in folder.glob("shard-*.safetensors")}
        lacking = [n for n in range(manifest.shards) if path_of(folder, n).name not in there]
        if lacking:
            raise FormatError(
                f"{len(lacking)} of {manifest.shards} shards of {folder} are missing (first "
                f"{lacking[0]}): build it again, which makes only these"
            )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.rows

    def __repr__(self) -> str:
        about = self.manifest
        return f"Store({self.folder}: {len(self)} rows × {about.dimension} {about.dtype})"

    @property
    def dimension(self) -> int:
        """Numbers in a row."""
        return self.manifest.dimension

    @cached_property
    def ids(self) -> np.ndarray:
        """`[n]` ids, integers or strings."""
        return self._labels("ids", "int64" if self.manifest.ids == "integer" else "string")

    @cached_property
    def norms(self) -> Tensor:
        """`[n]` lengths of the rows before they were rounded."""
        return torch.cat([shard.tensors["norms"] for shard in self._shards()])

    @cached_property
    def weights(self) -> Tensor | None:
        """`[n]` weights that rows are multiplied with, None where there are none."""
        if not self.manifest.weighted:
            return None
        return torch.cat([shard.tensors["weights"] for shard in self._shards()])

    def column(self, name: str) -> np.ndarray:
        """`[n, ...]` values of a column.

        Raises:
            DataError: there is no such column.
        """
        if name not in self.manifest.columns:
            raise DataError(
                f"the store has no column {name!r}: it has {named(sorted(self.manifest.columns))}"
            )
        return self._labels(f"column.{name}", self.manifest.columns[name].dtype)

    def blocks(self, rows_at_a_time: int = 16384, *, weighted: bool = True) -> Iterator[Block]:
        """All rows in order; a block has at most `rows_at_a_time` and never crosses a shard.

        Args:
            rows_at_a_time: most rows of a block.
            weighted: whether scales contain the weights of a weighted store.
        """
        if rows_at_a_time < 1:
            raise DataError(f"rows_at_a_time is {rows_at_a_time}: it must be at least 1")
        for number, shard in enumerate(self._shards()):
            shard.populate()
            first = self.manifest.rows_of(number).start
            scales = _scales(shard.tensors, weighted)
            values = shard.tensors["values"]
            for start in range(0, len(values), rows_at_a_time):
                part = slice(start, min(start + rows_at_a_time, len(values)))
                yield Block(
                    slice(first + part.start, first + part.stop),
                    values[part],
                    None if scales is None else scales[part],
                )

    def rows(
        self, positions: Sequence[int] | np.ndarray | Tensor | None = None, *, ids: Sequence = ()
    ) -> Tensor:
        """Rows at random, `[m, k]` in float32: at `positions`, or those of `ids`.

        Raises:
            DataError: a position or id is not there.
        """
        where = self.positions(ids) if positions is None else np.asarray(positions, dtype=np.int64)
        bad = (where < 0) | (where >= len(self))
        if bad.any():
            raise DataError(
                f"position {where[bad][0]} is not in the store: it has {len(self)} rows, from 0"
            )
        out = torch.empty(len(where), self.dimension)
        order = np.argsort(where, kind="stable")  # pages are then read in the order of the file
        ordered = where[order]
        numbers = ordered // self.manifest.shard_rows
        first = np.flatnonzero(np.diff(numbers, prepend=-1))
        for start, stop in zip(first, [*first[1:], len(where)], strict=True):
            shard = self.shard(int(numbers[start]))
            inside = torch.from_numpy(ordered[start:stop] % self.manifest.shard_rows)
            scales = _scales(shard.tensors)
            part = decode(
                shard.tensors["values"][inside], None if scales is None else scales[inside]
            )
            out[torch.from_numpy(order[start:stop])] = part
        return out

    def positions(self, ids: Sequence | np.ndarray) -> np.ndarray:
        """`[m]` positions of `ids`.

        Raises:
            DataError: an id is not in the store.
        """
        wanted = np.asarray(ids)
        if len(wanted) == 0:
            return np.empty(0, dtype=np.int64)
        same_kind = (wanted.dtype.kind in "iu") == (self.manifest.ids == "integer")
        order, ordered = self._index
        place = np.searchsorted(ordered, wanted) if same_kind else np.zeros(len(wanted), int)
        found = ordered[np.minimum(place, len(self) - 1)] == wanted
        if not same_kind or not found.all():
            absent = wanted if not same_kind else wanted[~found]
            raise DataError(
                f"id {named(absent)} is not in the store, whose ids are of type "
                f"{self.manifest.ids}, such as {named(self.ids[:1])}"
            )
        return order[place]

    def require_unique_ids(self) -> None:
        """Raise `DataError` when an id stands more than once."""
        order, ordered = self._index
        twice = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(twice):
            a, b = sorted(order[twice[0] : twice[0] + 2].tolist())
            raise DataError(
                f"{len(twice)} ids stand more than once (id {named(ordered[twice[:1]])} at "
                f"positions {a} and {b}): ids must be unique in the whole store"
            )

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the order of ids, and ids in that order."""
        order = np.argsort(self.ids, kind="stable")
        return order, self.ids[order]

    def _shards(self) -> Iterator[Shard]:
        for number in range(self.manifest.shards):
            yield self.shard(number)

    def _labels(self, name: str, dtype: str) -> np.ndarray:
        if dtype == "string":
            return np.asarray([text for shard in self._shards() for text in shard.strings(name)])
        return torch.cat([shard.tensors[name] for shard in self._shards()]).numpy()


def _scales(tensors: Mapping[str, Tensor], weighted: bool = True) -> Tensor | None:
    """What rows of a shard are multiplied with: scales of int8, and weights."""
    scales, weights = tensors.get("scales"), tensors.get("weights") if weighted else None
    if scales is None or weights is None:
        return weights if scales is None else scales
    return scales * weights
