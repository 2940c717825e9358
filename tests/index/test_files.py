"""The folder of an index: refused when it does not fit, rebuilt at any time."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from index_stores import DIMENSION, draw, strongest, write_store

from forebear import index
from forebear.errors import ForebearError, FormatError, MismatchError
from forebear.store import Store, verify
from forebear.store.lock import Lock

SETTINGS: dict[str, dict[str, Any]] = {
    "ivf": {"lists": 10, "probes": 10},
    "pq": {"lists": 10, "probes": 10, "parts": 8},
    "hnsw": {"breadth": 500},
    "qdrant": {},
}
AGAIN = r"build it again: forebear.index.build\(store, '{}'\)"


@pytest.fixture
def small(tmp_path: Path) -> Store:
    return write_store(tmp_path / "store", draw(500, DIMENSION), shard_rows=200)


def replaced(store: Store, seed: int) -> Store:
    """The store in the same folder after it was built anew; its indexes stay."""
    for path in store.folder.iterdir():
        if path.is_file():
            path.unlink()
    return write_store(store.folder, draw(500, DIMENSION, seed=seed), shard_rows=200)


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_index_of_other_rows_is_refused(kind: str, small: Store) -> None:
    built = index.build(small, kind, **SETTINGS[kind])
    same = replaced(small, seed=0)
    assert index.open(same, kind).recall == built.recall
    other = replaced(small, seed=1)
    with pytest.raises(MismatchError, match="built from other rows.*" + AGAIN.format(kind)):
        index.open(other, kind)
    index.build(other, kind, **SETTINGS[kind])
    queries = draw(3, DIMENSION, seed=2)
    found = index.open(other, kind).search(queries, 5)
    assert (found.positions.numpy() == strongest(other, queries, 5)[0]).all()


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_index_may_be_deleted(kind: str, small: Store) -> None:
    built = index.build(small, kind, **SETTINGS[kind])
    shutil.rmtree(built.folder)
    with pytest.raises(FormatError, match="no finished index.*" + AGAIN.format(kind)):
        index.open(small, kind)
    assert index.build(small, kind, **SETTINGS[kind]).recall == built.recall


def test_the_store_does_not_mind(small: Store) -> None:
    index.build(small, "ivf")
    assert verify(small.folder).complete
    assert len(Store.open(small.folder)) == 500


@pytest.mark.parametrize("kind", ["ivf", "pq", "hnsw"])
@pytest.mark.parametrize("how", ["cut", "flip", "remove"])
def test_a_damaged_file_is_found(kind: str, how: str, small: Store) -> None:
    path = index.build(small, kind, **SETTINGS[kind]).folder / "index.faiss"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(content if how == "flip" else content[:-1])
    with pytest.raises(FormatError, match=r"index\.faiss.*" + AGAIN.format(kind)):
        index.open(small, kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.pop("settings"), "damaged.*settings.*build it again"),
        (lambda about: about["recall"].pop("mean"), "damaged.*mean.*build it again"),
        (lambda about: about.update(kind="pq"), "holds an index of kind 'pq'"),
        (lambda about: about.update(format=99), "upgrade forebear"),
        (lambda about: about["settings"].update(speed=9), "damaged.*speed.*build it again"),
    ],
)
def test_a_damaged_description_is_found(change: Any, message: str, small: Store) -> None:
    path = index.build(small, "ivf", **SETTINGS["ivf"]).folder / "index.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))
    with pytest.raises(FormatError, match=message):
        index.open(small, "ivf")
    path.write_text("{")
    with pytest.raises(FormatError, match=r"damaged.*build it again"):
        index.open(small, "ivf")


def test_one_process_builds_at_a_time(small: Store) -> None:
    folder = small.folder / "index-ivf"
    folder.mkdir()
    lock = Lock(folder)
    lock.take()
    try:
        with pytest.raises(ForebearError, match="index-ivf is being built by process"):
            index.build(small, "ivf")
    finally:
        lock.release()
    assert index.build(small, "ivf").recall.mean > 0


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_half_written(small: Store) -> None:
    folder = index.build(small, "ivf", **SETTINGS["ivf"]).folder
    with largest_file(4096), pytest.raises(OSError, match=r"index\.faiss could not be written"):
        index.build(small, "ivf", **SETTINGS["ivf"])
    assert sorted(path.name for path in folder.iterdir()) == ["index.faiss"]
    with pytest.raises(FormatError, match="no finished index"):
        index.open(small, "ivf")
    assert index.build(small, "ivf", **SETTINGS["ivf"]).recall.mean == 1.0
