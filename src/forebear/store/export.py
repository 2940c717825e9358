"""Stores as files that other programs read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from forebear.progress import track
from forebear.store.files import PARTIAL
from forebear.store.reader import Block, Store
from forebear.store.rows import decode

ROWS = 8192


def to_parquet(store: Store, path: str | Path) -> None:
    """A table with `id`, `norm`, the columns and `values`, a list of float32 for each row.

    Written a part at a time and under a temporary name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    labels: dict[str, np.ndarray] = {"id": store.ids, "norm": store.norms.numpy()}
    labels |= {name: store.column(name) for name in store.manifest.columns}
    writer: Any = None
    try:
        for block in _blocks(store):
            table: dict[str, Any] = {n: _listed(v[block.rows]) for n, v in labels.items()}
            flat = decode(block.values, block.scales).reshape(-1).numpy()
            table["values"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), store.dimension)
            made = pa.table(table)
            writer = writer or pq.ParquetWriter(partial, made.schema)
            writer.write_table(made)
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def to_npy(store: Store, folder: str | Path) -> None:
    """`values.npy` `[n, k]` in float32, `ids.npy`, `norms.npy` and `column-NAME.npy`.

    `values.npy` is written last, a part at a time and under a temporary name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "ids.npy", store.ids)
    np.save(folder / "norms.npy", store.norms.numpy())
    for name in store.manifest.columns:
        np.save(folder / f"column-{name}.npy", store.column(name))
    partial = folder / f"values.npy{PARTIAL}"
    try:
        shape = (len(store), store.dimension)
        out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        for block in _blocks(store):
            out[block.rows] = decode(block.values, block.scales).numpy()
        out.flush()
        partial.replace(folder / "values.npy")
    finally:
        partial.unlink(missing_ok=True)


def _blocks(store: Store) -> Iterator[Block]:
    return track(store.blocks(ROWS), "blocks")


def _listed(values: np.ndarray) -> Any:
    return values if values.ndim == 1 else list(values)
