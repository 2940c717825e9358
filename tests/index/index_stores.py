"""Stores with columns, and what numpy says of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from forebear.search import Between, Equals, OneOf
from forebear.store import Column, Manifest, Store, StoreBuilder

ROWS, DIMENSION = 2000, 16
COLUMNS = {
    "label": Column("int64"),
    "source": Column("string"),
    "weight": Column("float32"),
    "date": Column("string"),
    "good": Column("bool"),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def columns_of(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "label": rng.integers(4, size=rows),
        "source": np.array(["web", "book", "code"])[rng.integers(3, size=rows)],
        "weight": rng.random(rows, dtype=np.float32).round(1),
        "date": np.array([f"2024-{month:02d}-01" for month in rng.integers(1, 13, rows)]),
        "good": rng.random(rows) < 0.7,
    }


def write_store(folder: Path, values: Tensor, **facts: Any) -> Store:
    rows = len(values)
    manifest = Manifest(rows=rows, dimension=values.shape[1], columns=COLUMNS, **facts)
    columns, ids = columns_of(rows), np.arange(rows) + 10_000
    weights = draw(rows, seed=9).abs() + 0.1 if manifest.weighted else None
    with StoreBuilder.create(folder, manifest) as builder:
        for shard in builder.missing():
            part = manifest.rows_of(shard)
            some = {name: column[part] for name, column in columns.items()}
            builder.write(
                shard, values[part], ids[part], some, None if weights is None else weights[part]
            )
        return builder.finish()


def products(store: Store, queries: Tensor) -> np.ndarray:
    """All of them `[q, n]` in double precision, rounded to float32."""
    rows = store.rows(range(len(store))).numpy().astype(np.float64)
    return (queries.numpy().astype(np.float64) @ rows.T).astype(np.float32)


def strongest(
    store: Store, queries: Tensor, k: int, *, mask: Any = None, opponents: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values `[q, k]` by sorting everything."""
    scores = products(store, queries)
    ranked = scores if opponents else -scores
    if mask is not None:
        ranked = np.where(mask, ranked, np.inf)
    order = np.argsort(ranked, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, 1)


LEAVES = st.one_of(
    st.builds(Equals, st.just("label"), st.integers(0, 3)),
    st.builds(Equals, st.just("good"), st.booleans()),
    st.builds(Equals, st.just("weight"), st.sampled_from([0.1, 0.25, 0.7])),
    st.builds(OneOf, st.just("label"), st.lists(st.integers(0, 4), max_size=3)),
    st.builds(OneOf, st.just("source"), st.lists(st.sampled_from(["web", "book", "x"]))),
    st.builds(Between, st.just("weight"), st.just(0.3), st.none() | st.just(0.8)),
    st.builds(Between, st.just("label"), st.none() | st.just(1), st.none() | st.just(2.5)),
    st.builds(Between, st.just("date"), st.just("2024-04"), st.none() | st.just("2024-08-02")),
)
CONDITIONS = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds(lambda one, other: one & other, inner, inner)
        | st.builds(lambda one, other: one | other, inner, inner)
        | inner.map(lambda one: ~one)
    ),
    max_leaves=4,
)
