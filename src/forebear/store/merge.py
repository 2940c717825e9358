"""One store of several."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from forebear.errors import DataError
from forebear.progress import track
from forebear.store.builder import StoreBuilder
from forebear.store.manifest import FINGERPRINTS, SAME
from forebear.store.reader import Store

STORED = ("values", "norms", "scales", "weights")


def merge(
    sources: Sequence[str | Path], folder: str | Path, *, shard_rows: int | None = None
) -> Store:
    """The rows of several stores, one store after the other, as they are: nothing is rounded again.

    Stopped halfway, the same call goes on where it stopped. Stores of other parts of a dataset may
    be merged; `train` of the result is then made of theirs.

    Args:
        sources: folders of complete stores.
        folder: of the result.
        shard_rows: of the result; that of the first source when left out.

    Raises:
        MismatchError: they were built from another model, with other settings or in another form.
        DataError: an id is in two of them.
    """
    stores = [Store.open(source) for source in sources]
    if not stores:
        raise DataError("there is nothing to merge: give at least one store")
    if Path(folder).resolve() in {store.folder.resolve() for store in stores}:
        raise DataError(f"{folder} is one of the stores to merge: choose another folder")
    first = stores[0].manifest
    for other in stores[1:]:
        first.require_same(other.manifest, (*SAME, *FINGERPRINTS))
    _require_disjoint(stores)
    manifest = first.with_rows(
        sum(len(store) for store in stores),
        shard_rows=shard_rows or first.shard_rows,
        train=_train([store.manifest.train for store in stores]),
    )
    ids = np.concatenate([store.ids for store in stores])
    columns = {
        name: np.concatenate([store.column(name) for store in stores]) for name in manifest.columns
    }
    with StoreBuilder.create(folder, manifest) as builder:
        for shard in track(builder.missing(), "shards"):
            rows = manifest.rows_of(shard)
            labels = {name: column[rows] for name, column in columns.items()}
            builder.copy(shard, _gathered(stores, rows), ids[rows], labels)
        return builder.finish()


@dataclass(frozen=True)
class _Part:
    """Consecutive rows of one shard of one store."""

    store: Store
    shard: int
    rows: slice


def _gathered(stores: Sequence[Store], rows: slice) -> dict[str, Tensor]:
    """The stored tensors of rows of the result."""
    parts = [
        {
            name: tensor[part.rows]
            for name, tensor in part.store.shard(part.shard).tensors.items()
            if name in STORED
        }
        for part in _parts(stores, rows)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _parts(stores: Sequence[Store], rows: slice) -> Iterator[_Part]:
    offset = 0
    for store in stores:
        start, stop = max(rows.start - offset, 0), min(rows.stop - offset, len(store))
        size = store.manifest.shard_rows
        while start < stop:
            shard, inside = divmod(start, size)
            taken = min(stop - start, size - inside)
            yield _Part(store, shard, slice(inside, inside + taken))
            start += taken
        offset += len(store)


def _train(fingerprints: Sequence[str]) -> str:
    """Of parts of one dataset what they share, else a fingerprint of theirs in order."""
    if len(set(fingerprints)) == 1:
        return fingerprints[0]
    return hashlib.sha256("+".join(fingerprints).encode()).hexdigest()[:16]


def _require_disjoint(stores: Sequence[Store]) -> None:
    for i, store in enumerate(stores):
        for other in stores[i + 1 :]:
            both = np.intersect1d(store.ids, other.ids)
            if len(both):
                raise DataError(
                    f"id {both[0].item()!r} and {len(both) - 1} more are in {store.folder} and in "
                    f"{other.folder}: ids must be disjoint"
                )
