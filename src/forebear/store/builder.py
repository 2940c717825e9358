"""Building a store shard by shard; what is there is not done again."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from forebear.errors import DataError, FormatError
from forebear.store.files import PARTIAL, explained, sync_folder
from forebear.store.lock import Lock
from forebear.store.manifest import NAME, Manifest
from forebear.store.reader import Store
from forebear.store.rows import encode, named
from forebear.store.shards import Shard, packed, path_of, write_shard

Columns = Mapping[str, np.ndarray | Tensor | Sequence]


class ShardWriter:
    """Writes shards of a store, without the right to: that is the builder's.

    It may go to other processes, by pickle.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def has(self, shard: int, *, deep: bool = False) -> bool:
        """Whether a shard is written; `deep` compares its content with its hash too."""
        if not path_of(self.folder, shard).exists():
            return False
        try:
            opened = Shard.open(self.folder, shard, self.manifest)
        except FormatError:
            return False
        return not deep or opened.intact

    def missing(self, *, deep: bool = False) -> list[int]:
        """Numbers of the shards that are to be written.

        Args:
            deep: read every shard and count those whose content has another hash too. Shards of
                a wrong size or header count in any case.
        """
        return [n for n in range(self.manifest.shards) if not self.has(n, deep=deep)]

    def write(
        self,
        shard: int,
        values: Tensor,
        ids: Sequence | np.ndarray,
        columns: Columns | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Round rows to the stored type and write them as one shard, whole or not at all.

        Args:
            shard: its number.
            values: `[b, k]`; b is the number of rows that belong into this shard.
            ids: `[b]`, unique in the whole store.
            columns: `[b, ...]` for each column of the manifest.
            weights: `[b]`, for weighted stores: a row stands for its vector times its weight.

        Raises:
            DataError: shapes, ids or columns are not those of the manifest.
            NonFiniteError: a row is NaN or infinite, with ids.
            OSError: the disk is full or read-only; nothing of the shard is left behind.
        """
        self._require_shape(shard, values)
        labels = self._labels(shard, np.asarray(ids), columns or {})
        stored = encode(values, self.manifest.dtype, np.asarray(ids), self.manifest.scale_columns)
        if self.manifest.weighted != (weights is not None):
            raise DataError(
                f"the store is {'' if self.manifest.weighted else 'not '}weighted and weights were "
                f"{'' if weights is not None else 'not '}given"
            )
        if weights is not None:
            factor = encode(weights.reshape(len(values), 1), "float32", np.asarray(ids))["values"]
            stored["weights"] = factor[:, 0]
            stored["norms"] = stored["norms"] * factor[:, 0].abs()
        given = (values, weights)
        self._put(shard, {name: _own(tensor, given) for name, tensor in (stored | labels).items()})

    def copy(
        self,
        shard: int,
        stored: Mapping[str, Tensor],
        ids: np.ndarray,
        columns: Columns,
    ) -> None:
        """Write rows that another store has rounded already: values, norms, scales, weights."""
        self._require_shape(shard, stored["values"])
        self._put(shard, {**stored, **self._labels(shard, ids, columns)})

    def _put(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        write_shard(self.folder, shard, tensors)

    def _require_shape(self, shard: int, values: Tensor) -> None:
        rows, dimension = self.manifest.rows_of(shard), self.manifest.dimension
        if values.ndim != 2 or values.shape[1] != dimension:
            raise DataError(
                f"rows of shard {shard} have shape {tuple(values.shape[1:])}, the store has "
                f"{dimension} numbers a row: were they collected with another projection?"
            )
        if len(values) != rows.stop - rows.start:
            raise DataError(
                f"shard {shard} was given {len(values)} rows and has {rows.stop - rows.start}: "
                f"positions {rows.start} to {rows.stop - 1}"
            )

    def _labels(self, shard: int, ids: np.ndarray, columns: Columns) -> dict[str, Tensor]:
        """Ids and columns as tensors."""
        expected, rows = self.manifest.columns, self.manifest.rows_of(shard)
        size = rows.stop - rows.start
        integer = ids.dtype.kind in "iu"
        if len(ids) != size or integer != (self.manifest.ids == "integer"):
            raise DataError(
                f"shard {shard} was given {len(ids)} ids of type {ids.dtype} and needs {size} of "
                f"type {self.manifest.ids}"
            )
        if columns.keys() != expected.keys():
            raise DataError(
                f"columns {named(sorted(columns))} were given and the store has "
                f"{named(sorted(expected))}: give each of them"
            )
        found = packed("ids", ids, "int64" if integer else "string")
        for name, column in expected.items():
            given: Any = columns[name]
            values = given.numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
            if values.shape != (size, *column.shape):
                raise DataError(
                    f"column {name!r} of shard {shard} has shape {values.shape}: it must be "
                    f"{(size, *column.shape)}"
                )
            found |= packed(f"column.{name}", values, column.dtype)
        return found


class StoreBuilder(ShardWriter):
    """The right to write a store, held until `finish` or `close`; a context manager.

        with StoreBuilder.create(folder, manifest) as builder:
            for shard in builder.missing():
                rows = manifest.rows_of(shard)
                builder.write(shard, values[rows], ids[rows])
            store = builder.finish()

    Shards may be written in any order. After a crash the same program goes on where it stopped.
    Other processes may help while the builder holds the lock: each takes its `writer`.

    The builder's own shards reach the disk in the background, while the next one is worked out: at
    most one is on its way, and what is given to `write` may be changed as soon as it returns. What
    goes wrong on the way is raised by the next `write`, `missing`, `finish` or `close`.
    """

    def __init__(self, folder: Path, manifest: Manifest, lock: Lock) -> None:
        super().__init__(folder, manifest)
        self._lock = lock
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="forebear-store")
        self._on_its_way: Future[None] | None = None

    @classmethod
    def create(cls, folder: str | Path, manifest: Manifest) -> Self:
        """Begin a store, or go on with one that was begun with the same manifest.

        Raises:
            MismatchError: the folder holds another store; the message names what differs.
            FormatError: its manifest is damaged or from a newer version.
            ForebearError: another process is building it.
            OSError: the folder cannot be written to.
        """
        folder = Path(folder)
        lock = Lock(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explained(error, folder) from error
        lock.take()
        try:
            _sweep(folder)
            if (folder / NAME).exists():
                begun = Manifest.read(folder)
                begun.require_same(manifest)
                begun.require_same(manifest, ("rows", "shard_rows"))
                manifest = begun
            elif any(folder.glob("shard-*.safetensors")):
                raise FormatError(
                    f"{folder} holds shards and no {NAME}: choose another folder, or delete them"
                )
            else:
                manifest.write(folder)
        except BaseException:
            lock.release()
            raise
        return cls(folder, manifest, lock)

    @classmethod
    def resume(cls, folder: str | Path) -> Self:
        """Go on with a store whatever it holds; its manifest is read from the folder.

        Raises:
            FormatError: there is none, or it is damaged or from a newer version.
            ForebearError: another process is building it.
        """
        return cls.create(folder, Manifest.read(Path(folder)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # else it would hide what went wrong first
                raise

    def close(self) -> None:
        """Let others build; what was written stays.

        Raises:
            OSError: the last shard could not be written.
        """
        try:
            self._wait()
        finally:
            self._pool.shutdown()
            self._lock.release()

    def missing(self, *, deep: bool = False) -> list[int]:
        """As of any writer, after waiting for the shard on its way.

        Raises:
            OSError: it could not be written.
        """
        self._wait()
        return super().missing(deep=deep)

    def _put(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        self._wait()
        self._on_its_way = self._pool.submit(write_shard, self.folder, shard, tensors)

    def _wait(self) -> None:
        last, self._on_its_way = self._on_its_way, None
        if last is not None:
            last.result()

    @property
    def writer(self) -> ShardWriter:
        """What other processes write shards with."""
        return ShardWriter(self.folder, self.manifest)

    def finish(self) -> Store:
        """Check that every shard is there and every id stands once, and open the store.

        Raises:
            FormatError: shards are missing.
            DataError: an id stands more than once, in one shard or in two.
            OSError: the last shard could not be written.
        """
        lacking = self.missing()
        if lacking:
            raise FormatError(
                f"{len(lacking)} of {self.manifest.shards} shards of {self.folder} are missing "
                f"(first {lacking[0]}): write them first"
            )
        store = Store.open(self.folder)
        store.require_unique_ids()
        _sweep(self.folder)  # of workers that were killed while they wrote
        sync_folder(self.folder)
        self.close()
        return store


def _own(tensor: Tensor, given: tuple[Tensor | None, ...]) -> Tensor:
    """`tensor`, copied where it is the memory of something that was given (float32 rows)."""
    mine = tensor.untyped_storage().data_ptr()
    shared = any(t is not None and t.untyped_storage().data_ptr() == mine for t in given)
    return tensor.clone() if shared else tensor


def _sweep(folder: Path) -> None:
    """Remove what is left of writers that died."""
    for left in folder.glob(f"*{PARTIAL}"):
        left.unlink(missing_ok=True)
