"""Qdrant is asked in its own words, resumes uploads, and no key is written down."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from index_stores import CONDITIONS, DIMENSION, columns_of, draw, strongest, write_store
from qdrant_client import QdrantClient

from forebear import index
from forebear.errors import DataError, ForebearError, FormatError
from forebear.index import StoredIndex
from forebear.index.conditions import translated
from forebear.index.qdrant import Collection
from forebear.search import Between, Equals, OneOf
from forebear.store import Column, Manifest, Store, StoreBuilder

ROWS = 300
SERVER = "http://qdrant.test:6333"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("qdrant") / "store", draw(ROWS, DIMENSION))


@pytest.fixture(scope="module")
def built(small: Store) -> StoredIndex:
    return index.build(small, "qdrant")


def chosen_by_qdrant(built: StoredIndex, condition: Any) -> np.ndarray | None:
    """`[n]` bool, by Qdrant alone; None where the filter has no words in Qdrant."""
    words = translated(condition, built.store.manifest.columns)
    if words is None:
        return None
    points, _ = built.handle.client.scroll(
        built.handle.name, scroll_filter=words, limit=len(built.store), with_payload=False
    )
    mask = np.zeros(len(built.store), bool)
    mask[[point.id for point in points]] = True
    return mask


@settings(max_examples=60, deadline=None)
@given(condition=CONDITIONS)
def test_filters_mean_the_same_in_qdrant(built: StoredIndex, condition: Any) -> None:
    found = chosen_by_qdrant(built, condition)
    if found is not None:
        expected = condition.matches(columns_of(ROWS).__getitem__, slice(0, ROWS))
        assert (found == expected).all()


@pytest.mark.parametrize(
    "condition",
    [
        Equals("label", 2),
        Equals("source", "web"),
        Equals("good", False),
        Equals("weight", 0.7),
        OneOf("label", [0, 3]),
        OneOf("source", ["book", "code"]),
        Between("weight", 0.3, 0.6),
        Between("label", 1),
        ~(Equals("label", 2) | Equals("source", "web")) & Between("weight", high=0.9),
    ],
    ids=str,
)
def test_usual_filters_have_words_in_qdrant(built: StoredIndex, condition: Any) -> None:
    expected = condition.matches(columns_of(ROWS).__getitem__, slice(0, ROWS))
    found = chosen_by_qdrant(built, condition)
    assert found is not None
    assert (found == expected).all()
    assert 0 < expected.sum() < ROWS


@pytest.mark.parametrize(
    "condition",
    [
        Between("date", "2024-03", "2024-09"),  # Qdrant has no order of texts
        Equals("label", 2.0),
        Equals("weight", np.float64(0.7)),
        OneOf("weight", [0.1, 0.7]),
        Between("weight", float("-inf"), 0.5),
    ],
    ids=str,
)
def test_other_filters_become_lists_of_rows(
    built: StoredIndex, small: Store, condition: Any
) -> None:
    assert translated(condition, small.manifest.columns) is None
    mask = condition.matches(columns_of(ROWS).__getitem__, slice(0, ROWS))
    queries = draw(3, DIMENSION, seed=1)
    found = built.search(queries, 4, filter=condition if mask.sum() > 3 else mask | True)
    expected = strongest(small, queries, 4, mask=mask if mask.sum() > 3 else None)[0]
    assert (found.positions.numpy() == expected).all()


def test_infinite_and_missing_numbers_are_compared_as_numpy_does(tmp_path: Path) -> None:
    numbers = np.array([np.nan, np.inf, -np.inf, 0.0, 3.0] * 20)
    manifest = Manifest(rows=100, dimension=4, columns={"size": Column("float64")})
    with StoreBuilder.create(tmp_path / "store", manifest) as builder:
        builder.write(0, draw(100, 4), np.arange(100), {"size": numbers})
        store = builder.finish()
    built = index.build(store, "qdrant")
    for condition in (
        Between("size", 1),
        Between("size", high=1),
        ~Between("size", 1, 4),
        Equals("size", 3.0),
    ):
        expected = condition.matches({"size": numbers}.__getitem__, slice(0, 100))
        assert (chosen_by_qdrant(built, condition) == expected).all()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> QdrantClient:
    """A client that holds its points itself, in place of one that talks to a server."""
    client = QdrantClient(":memory:")
    monkeypatch.setattr(Collection, "_client", lambda self: client)
    monkeypatch.setattr("forebear.index.qdrant.PAUSE", 0.0)
    return client


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
@pytest.mark.filterwarnings("ignore:Local mode performs exact")
def test_only_rows_that_are_missing_are_uploaded(
    server: QdrantClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path / "store", draw(ROWS, DIMENSION))
    sent: list[int] = []
    upsert = server.upsert

    def counted(name: str, points: Any, **more: Any) -> Any:
        sent.extend(points.ids)
        return upsert(name, points, **more)

    asked: list[dict[str, Any]] = []
    create = server.create_collection

    def recorded(name: str, **more: Any) -> Any:
        asked.append(more)
        return create(name, **more)

    monkeypatch.setattr(server, "upsert", counted)
    monkeypatch.setattr(server, "create_collection", recorded)
    built = index.build(store, "qdrant", url=SERVER, quantised=True)
    assert sent == list(range(ROWS))
    name = built.handle.name
    assert [one.name for one in server.get_collections().collections] == [name]
    assert asked[0]["quantization_config"].scalar.type == "int8"
    assert (asked[0]["vectors_config"].distance, asked[0]["vectors_config"].on_disk) == (
        "Dot",
        True,
    )
    server.delete(name, [5, 17, 250])
    with pytest.raises(FormatError, match=f"{SERVER} holds 297 of 300 rows: build it again"):
        index.open(store, "qdrant")
    sent.clear()
    index.build(store, "qdrant", url=SERVER, quantised=True)
    assert sent == [5, 17, 250]
    sent.clear()
    opened = index.open(store, "qdrant")
    assert sent == []
    queries = draw(3, DIMENSION, seed=1)
    assert (opened.search(queries, 6).positions.numpy() == strongest(store, queries, 6)[0]).all()
    point = server.retrieve(name, [250], with_vectors=True)[0]
    assert point.payload["id"] == store.ids[250]
    assert point.payload["columns"]["source"] == store.column("source")[250]
    assert np.allclose(point.vector, store.rows([250])[0])


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
@pytest.mark.filterwarnings("ignore:Local mode performs exact")
def test_no_key_is_written(
    server: QdrantClient, small: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDRANT_API_KEY", "very secret")
    folder = index.build(small, "qdrant", url=SERVER).folder
    content = (folder / "index.json").read_text()
    assert "very secret" not in content
    assert json.loads(content)["settings"]["url"] == SERVER
    with pytest.raises(
        DataError, match=r"qdrant\.test holds a password.*QDRANT_API_KEY"
    ) as refused:
        index.build(small, "qdrant", url="http://me:word@qdrant.test:6333")
    assert "word@" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:Failed to obtain server version")
def test_a_server_that_does_not_answer_is_named(small: Store) -> None:
    with pytest.raises(ForebearError, match=r"Qdrant at http://127.0.0.1:1 .*is it running"):
        index.build(small, "qdrant", url="http://127.0.0.1:1")
