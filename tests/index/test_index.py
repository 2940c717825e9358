"""Every kind of index finds what sorting all products finds, when it makes enough effort."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index_stores import CONDITIONS, DIMENSION, ROWS, columns_of, draw, strongest, write_store

from forebear import index
from forebear.errors import DataError, MismatchError, MissingDependencyError, UnknownNameError
from forebear.index import StoredIndex
from forebear.search import Equals
from forebear.store import Store

THOROUGH: dict[str, dict[str, Any]] = {
    "ivf": {"lists": 20, "probes": 20, "refine": 4},
    "pq": {"lists": 20, "probes": 20, "parts": 8, "refine": 20},
    "hnsw": {"breadth": ROWS, "refine": 4},
    "qdrant": {},
}
FAISS = ("ivf", "pq", "hnsw")
Built = dict[str, StoredIndex]


@pytest.fixture(scope="module")
def built(store: Store) -> Built:
    return {kind: index.build(store, kind, **more) for kind, more in THOROUGH.items()}


def test_no_kind_is_left_out() -> None:
    assert THOROUGH.keys() == index.KINDS.keys()


@pytest.mark.parametrize("kind", THOROUGH)
@pytest.mark.parametrize("opponents", [False, True])
def test_rows_and_values_are_those_of_sorting_everything(
    kind: str, opponents: bool, built: Built, store: Store
) -> None:
    queries = draw(7, DIMENSION, seed=1)
    found = built[kind].search(queries, 5, opponents=opponents)
    assert not found.exact.any()  # the index itself was asked
    positions, values = strongest(store, queries, 5, opponents=opponents)
    assert (found.positions.numpy() == positions).all()
    assert (found.values.numpy() == values).all()


@pytest.mark.parametrize("kind", THOROUGH)
def test_one_query_may_come_alone(kind: str, built: Built, store: Store) -> None:
    query = draw(DIMENSION, seed=2)
    found = built[kind].search(query, 3)
    assert found.positions.tolist() == strongest(store, query[None], 3)[0].tolist()


@pytest.mark.parametrize("kind", THOROUGH)
def test_equal_rows_stand_in_the_order_of_the_rows(kind: str, tmp_path: Path) -> None:
    values = torch.randint(-1, 2, (600, 3), generator=torch.Generator().manual_seed(0)).float()
    store = write_store(tmp_path, values, dtype="float32")
    built = index.build(store, kind, **{**THOROUGH[kind], "refine": 20} | _parts(kind, 3))
    queries = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]])
    found = built.search(queries, 12)
    assert not found.exact.any()
    assert (found.values.numpy() == strongest(store, queries, 12)[1]).all()
    for positions, products in zip(found.positions.numpy(), found.values.numpy(), strict=True):
        same = products[1:] == products[:-1]
        assert same.sum() > 5
        assert (np.diff(positions)[same] > 0).all()


@pytest.mark.parametrize("kind", FAISS)
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float16"])
def test_scales_and_weights_count(kind: str, dtype: Any, tmp_path: Path) -> None:
    store = write_store(tmp_path, draw(ROWS, DIMENSION), dtype=dtype, weighted=True)
    queries = draw(3, DIMENSION, seed=1)
    found = index.build(store, kind, **THOROUGH[kind]).search(queries, 5)
    positions, values = strongest(store, queries, 5)
    assert not found.exact.any()
    assert (found.positions.numpy() == positions).all()
    assert (found.values.numpy() == values).all()


def test_rows_that_do_not_divide_into_parts_are_coded(tmp_path: Path) -> None:
    store = write_store(tmp_path, draw(700, 13), dtype="float32")
    built = index.build(store, "pq", lists=5, probes=5, parts=6, refine=20)
    queries = draw(3, 13, seed=1)
    assert (built.search(queries, 5).positions.numpy() == strongest(store, queries, 5)[0]).all()


@pytest.mark.parametrize("kind", FAISS)  # Qdrant's words for filters have tests of their own
@settings(max_examples=40, deadline=None)
@given(condition=CONDITIONS, opponents=st.booleans())
def test_filters_leave_what_numpy_leaves(
    kind: str, built: Built, store: Store, condition: Any, opponents: bool
) -> None:
    columns = columns_of(ROWS)
    mask = condition.matches(columns.__getitem__, slice(0, ROWS))
    queries = draw(2, DIMENSION, seed=3)
    if mask.sum() < 5:
        with pytest.raises(DataError, match=f"the filter leaves {mask.sum()} rows"):
            built[kind].search(queries, 5, filter=condition)
        return
    found = built[kind].search(queries, 5, filter=condition, opponents=opponents)
    positions, values = strongest(store, queries, 5, mask=mask, opponents=opponents)
    assert (found.positions.numpy() == positions).all()
    assert (found.values.numpy() == values).all()
    assert found.exact.all() == (mask.sum() <= max(ROWS // 4 - 1, 5 * built[kind].config.refine))
    again = built[kind].search(queries, 5, filter=mask, opponents=opponents)
    assert (again.positions == found.positions).all()


def test_rows_that_the_index_does_not_find_are_searched_exactly(tmp_path: Path) -> None:
    store = write_store(tmp_path, draw(ROWS, DIMENSION), dtype="float32")
    built = index.build(store, "ivf", lists=200, probes=1)
    queries = draw(20, DIMENSION, seed=1)
    positions, values = strongest(store, queries, 30)
    found = built.search(queries, 30)
    assert found.exact.any()
    assert (found.positions.numpy() == positions)[found.exact].all()
    assert (found.values.numpy() == values)[found.exact].all()
    few = built.search(queries, 3)
    assert not few.exact.any()
    assert (few.positions.numpy() != positions[:, :3]).any()
    opponents = built.search(queries, 30, opponents=True)
    lowest = strongest(store, queries, 30, opponents=True)[1]
    assert opponents.exact.any()
    assert (opponents.values.numpy() == lowest)[opponents.exact].all()


@pytest.mark.parametrize("kind", THOROUGH)
def test_what_cannot_be_asked_is_refused_as_by_exact_search(kind: str, built: Built) -> None:
    query = draw(1, DIMENSION)
    for k in (0, ROWS + 1):
        with pytest.raises(DataError, match=f"k is {k} and there are {ROWS} rows"):
            built[kind].search(query, k)
    with pytest.raises(MismatchError, match="queries have 3 columns"):
        built[kind].search(draw(1, 3), 2)
    with pytest.raises(DataError, match="one bool for each"):
        built[kind].search(query, 2, filter=np.ones(ROWS, np.int64))
    with pytest.raises(DataError, match="one bool for each"):
        built[kind].search(query, 2, filter=np.ones(ROWS - 1, bool))
    with pytest.raises(DataError, match="compare like with like"):
        built[kind].search(query, 2, filter=Equals("label", "3"))
    with pytest.raises(DataError, match="no column 'colour'"):
        built[kind].search(query, 2, filter=Equals("colour", "red"))


@pytest.mark.parametrize("kind", THOROUGH)
def test_all_rows_may_be_wanted(kind: str, built: Built, store: Store) -> None:
    query = draw(1, DIMENSION)
    found = built[kind].search(query, ROWS)
    assert (found.positions.numpy() == strongest(store, query, ROWS)[0]).all()
    assert found.exact.all()


@pytest.mark.parametrize("kind", THOROUGH)
def test_building_again_gives_the_same(kind: str, store: Store, built: Built) -> None:
    queries = draw(9, DIMENSION, seed=4)
    first = built[kind]
    opened = index.open(store, kind)
    again = index.build(store, kind, **first.settings)
    for other in (opened, again):
        assert other.settings == first.settings
        assert other.recall == first.recall
        assert (other.search(queries, 8).positions == first.search(queries, 8).positions).all()


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("ivf", {"lists": 0}, "lists is 0: it must be a whole number"),
        ("ivf", {"lists": ROWS + 1}, "choose less"),
        ("ivf", {"probes": "8"}, "probes is '8'"),
        ("ivf", {"probes": True}, "probes is True"),
        ("ivf", {"recall_at_least": 90}, "choose a share"),
        ("ivf", {"sample": 0}, "sample is 0"),
        ("pq", {"bits": 9}, "choose 1 to 8"),
        ("pq", {"parts": 17}, "rows have 16 numbers"),
        ("hnsw", {"refine": 0.5}, "refine is 0.5: it must be a number of at least 1"),
        ("qdrant", {"url": "localhost:6333"}, "give one such as http"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    kind: str, more: dict[str, Any], message: str, store: Store
) -> None:
    with pytest.raises(DataError, match=message):
        index.build(store, kind, **more)


def test_codes_need_enough_rows(tmp_path: Path) -> None:
    small = write_store(tmp_path, draw(100, DIMENSION))
    with pytest.raises(DataError, match="256 codes cannot be learnt from 100 rows"):
        index.build(small, "pq")


def test_names_that_do_not_exist_are_corrected(store: Store) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'hnsw'"):
        index.build(store, "hsnw")
    with pytest.raises(UnknownNameError, match="did you mean 'probes'"):
        index.build(store, "ivf", nprobes=3)
    with pytest.raises(UnknownNameError, match="known: hnsw, ivf, pq, qdrant"):
        index.open(store, "flat")


@pytest.mark.parametrize(
    ("kind", "library"), [("ivf", "faiss"), ("hnsw", "faiss"), ("qdrant", "qdrant_client")]
)
def test_a_library_that_is_not_installed_is_named(
    kind: str, library: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'forebear\[index\]'"):
        index.build(store, kind)


def test_importing_loads_no_library() -> None:
    code = "import sys, forebear.index; print({'faiss', 'qdrant_client'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def _parts(kind: str, parts: int) -> dict[str, int]:
    return {"parts": parts} if kind == "pq" else {}
