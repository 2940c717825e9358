"""Reading a store: mapped into memory, in order or at random."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

ROW_TENSORS = {"values", "scales", "weights"}
"""Tensors of a shard that the numbers of its rows are made of."""

FEW = 4
"""Rows up to which each is read by itself."""

AHEAD = 2
"""Shards that are fetched before they are asked for."""


@dataclass(frozen=True)
class Block:
    """Some consecutive rows as they are kept.

    Attributes:
        rows: their positions in the store.
        values: `[b, k]` in the stored type: a view of the mapped file, not a copy.
        scales: what the values are to be multiplied with: `[b]` for each row, `[b, g]` for each
            `SCALE_COLUMNS` columns of each row (int8), or None. `decode(values, scales)` of
            `forebear.store` does it.
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

    @property
    def norms(self) -> Tensor:
        """`[n]` lengths of the rows before they were rounded."""
        return self._norms

    @cached_property
    def _norms(self) -> Tensor:
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
        for number, shard in enumerate(self._populated()):
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
        if len(where) <= FEW:
            return self._few(where.tolist())
        order = np.argsort(where, kind="stable")  # pages are then read in the order of the file
        numbers, inside = np.divmod(where[order], self.manifest.shard_rows)
        first = np.flatnonzero(np.diff(numbers, prepend=-1))
        ends = [*first[1:].tolist(), len(where)]
        rows = torch.from_numpy(inside)
        found: dict[str, Tensor] = {}
        for number, start, stop in zip(numbers[first].tolist(), first.tolist(), ends, strict=True):
            tensors = self.shard(number).tensors
            for name in ROW_TENSORS & tensors.keys():
                tensor = tensors[name]
                if name not in found:
                    found[name] = tensor.new_empty(len(where), *tensor.shape[1:])
                torch.index_select(tensor, 0, rows[start:stop], out=found[name][start:stop])
        back = torch.empty(len(where), dtype=torch.int64)
        back[torch.from_numpy(order)] = torch.arange(len(where))
        wanted = {name: tensor.index_select(0, back) for name, tensor in found.items()}
        return decode(wanted["values"], _scales(wanted))

    def _few(self, positions: list[int]) -> Tensor:
        """A few rows: putting them in the order of the file would take longer than reading them."""
        parts = [torch.empty(0, self.dimension)] if not positions else []
        for position in positions:
            number, inside = divmod(position, self.manifest.shard_rows)
            tensors = self.shard(number).tensors
            one = {
                name: tensors[name][inside : inside + 1] for name in ROW_TENSORS & tensors.keys()
            }
            parts.append(decode(one["values"], _scales(one)))
        return torch.cat(parts)

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

    def _populated(self) -> Iterator[Shard]:
        """All shards in order, each fetched while the one before it is worked on."""

        def fetch(number: int) -> Shard:
            shard = self.shard(number)
            shard.populate()
            return shard

        with ThreadPoolExecutor(1) as pool:
            ahead = deque(pool.submit(fetch, n) for n in range(min(AHEAD, self.manifest.shards)))
            for number in range(self.manifest.shards):
                shard = ahead.popleft().result()
                if number + AHEAD < self.manifest.shards:
                    ahead.append(pool.submit(fetch, number + AHEAD))
                yield shard

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
    return scales * (weights if scales.ndim == 1 else weights[:, None])
