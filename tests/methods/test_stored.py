"""State kept beside a store: answers without the training examples, and nothing mixed up."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import forebear as fb
from forebear.curvature import Dense, Identity
from forebear.errors import DataError, MismatchError, TaskError
from forebear.methods import stored
from forebear.methods.features import build_store, query_features
from forebear.methods.stored import fit_store, load_fitted, save_fitted
from forebear.projections import Gaussian, TwoSided
from forebear.store import Manifest, Store, StoreBuilder, merge

METHODS = {
    "trak": fb.TRAK(dimension=16, damping=0.05),
    "two-sided": fb.Influence(
        projection=TwoSided(12), curvature=Dense(kind="fisher", blocks="layers"), units="removal"
    ),
    "eigenvectors": fb.Influence(
        projection=Gaussian(8), curvature=Dense(kind="fisher", indefinite="pseudo_inverse")
    ),
    "graddot": fb.Influence(projection=Gaussian(16), curvature=Identity()),
    "similarity": fb.Similarity(),
}
N, Q = 30, 5


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def task(seed: int = 0, checkpoints: Any = None) -> fb.Task:
    return fb.Task(network(seed), fb.losses.cross_entropy, checkpoints=checkpoints)


def data(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=draw), torch.randint(3, (size,), generator=draw)


TRAIN, QUERIES = data(N, 1), data(Q, 2)


def no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on rows must not be gone through to find a curvature."""

    def refuse(self: object, *arguments: object) -> None:
        raise AssertionError("the rows were scanned")

    monkeypatch.setattr(stored.StoredStream, "gradients", refuse)


@pytest.mark.parametrize("name", METHODS)
def test_the_state_that_was_kept_gives_the_same_vectors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS[name]
    store = build_store(method, task(), TRAIN, tmp_path, dtype="float32", shard_rows=8)
    anew = query_features(fit_store(method, task(), TRAIN, store), QUERIES)
    no_scan(monkeypatch)
    again = fit_store(method, task(), TRAIN, Store.open(tmp_path))
    loaded = load_fitted(Store.open(tmp_path), task(), QUERIES)
    for fitted in (again, loaded):
        found = query_features(fitted, QUERIES)
        if name == "eigenvectors":  # in another order in memory, so added up in another order
            torch.testing.assert_close(found, anew)
        else:
            assert torch.equal(found, anew)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_loaded_scores_as_what_was_fitted_to_the_examples(
    name: str, tmp_path: Path
) -> None:
    method = METHODS[name]
    ids = [f"z{i}" for i in range(N)]
    build_store(method, task(), TRAIN, tmp_path, dtype="float32", shard_rows=8, ids=ids)
    expected = method.fit(task(), TRAIN, ids=ids)
    loaded = load_fitted(Store.open(tmp_path), task(), QUERIES)  # nothing was kept: it scans
    torch.testing.assert_close(
        loaded.score(QUERIES).values, expected.score(QUERIES).values, rtol=1e-3, atol=1e-5
    )
    assert loaded.top(QUERIES, 4).ids.tolist() == expected.top(QUERIES, 4).ids.tolist()
    torch.testing.assert_close(
        loaded.self_influence(), expected.self_influence(), rtol=1e-3, atol=1e-5
    )
    mine, theirs = (f.score(QUERIES).provenance for f in (loaded, expected))
    mine.require_same(theirs, ("method", "units", "coverage", "model", "train", "queries"))


def test_checkpoints_have_a_state_each_and_others_are_refused(tmp_path: Path) -> None:
    moments = [network(seed).state_dict() for seed in (1, 2)]
    method, some = METHODS["trak"], task(checkpoints=moments)
    store = build_store(method, some, TRAIN, tmp_path, dtype="float32")
    anew = query_features(fit_store(method, some, TRAIN, store), QUERIES)
    loaded = load_fitted(store, task(checkpoints=moments), QUERIES)
    assert torch.equal(query_features(loaded, QUERIES), anew)
    others = task(checkpoints=[moments[0], network(3).state_dict()])
    with pytest.raises(MismatchError, match="model differs"):
        load_fitted(store, others, QUERIES)
    with pytest.raises(MismatchError, match="model differs"):
        fit_store(method, others, TRAIN, store)


def test_stores_that_were_merged_are_fitted_from_all_their_rows(tmp_path: Path) -> None:
    method = METHODS["trak"]
    whole = build_store(method, task(), TRAIN, tmp_path / "whole", dtype="float32")
    for name, rows in (("a", slice(0, 12)), ("b", slice(12, N))):
        part = tuple(column[rows] for column in TRAIN)
        ids = np.arange(N)[rows]
        build_store(method, task(), part, tmp_path / name, dtype="float32", ids=ids)
    joined = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    expected = query_features(fit_store(method, task(), TRAIN, whole), QUERIES)
    found = query_features(load_fitted(joined, task(), QUERIES), QUERIES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["trak", "two-sided"])
def test_rows_are_read_a_few_at_a_time_wherever_pieces_and_shards_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS[name]
    store = build_store(method, task(), TRAIN, tmp_path, dtype="float32", shard_rows=8)
    expected = query_features(method.fit(task(), TRAIN), QUERIES)
    read: list[int] = []
    original = stored.StoredStream._read

    def counted(self: Any, shard: int, inside: Any) -> Any:
        features, weights = original(self, shard, inside)
        read.append(len(features))
        return features, weights

    monkeypatch.setattr(stored.StoredStream, "_read", counted)
    monkeypatch.setattr(stored, "READ", 5)
    monkeypatch.setattr("forebear.stream.PIECE", 7)
    found = query_features(fit_store(method, task(), TRAIN, store), QUERIES)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert max(read) <= 5
    assert sum(read) == N


@pytest.mark.parametrize("name", ["trak", "graddot", "similarity"])
def test_what_is_loaded_can_face_some_examples_only(name: str, tmp_path: Path) -> None:
    store = build_store(METHODS[name], task(), TRAIN, tmp_path, dtype="float32", shard_rows=8)
    loaded = load_fitted(store, task(), QUERIES)
    some = torch.tensor([0, 3, 7, 8, 20, 29])
    part = loaded.restricted(some)
    assert part is not None
    found = torch.cat([values for _, _, values in part.pieces(fb.Data(QUERIES))], 1)
    expected = loaded.score(QUERIES).values[:, some]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_damaged_state_or_that_of_another_store_is_found_again(tmp_path: Path) -> None:
    method = METHODS["trak"]
    store = build_store(method, task(), TRAIN, tmp_path / "a", dtype="float32")
    expected = query_features(fit_store(method, task(), TRAIN, store), QUERIES)
    path = tmp_path / "a" / "fitted" / "fitted.safetensors"
    content = path.read_bytes()
    for spoilt in (content[:100], content[:-4] + b"oops", b""):
        path.write_bytes(spoilt)
        assert torch.equal(query_features(load_fitted(store, task(), QUERIES), QUERIES), expected)
        assert path.read_bytes() == content  # and is kept again
    build_store(method, task(), data(N, 9), tmp_path / "b", dtype="float32")
    shutil.copytree(tmp_path / "a" / "fitted", tmp_path / "b" / "fitted")
    other = query_features(load_fitted(Store.open(tmp_path / "b"), task(), QUERIES), QUERIES)
    assert not torch.allclose(other, expected)


def test_another_model_method_or_layer_is_refused_by_name(tmp_path: Path) -> None:
    method = METHODS["trak"]
    store = build_store(method, task(), TRAIN, tmp_path)
    with pytest.raises(MismatchError, match="model differs"):
        load_fitted(store, task(5), QUERIES)
    with pytest.raises(MismatchError, match="settings differs"):
        load_fitted(store, task(), QUERIES, method=fb.TRAK(dimension=16, damping=0.2))
    narrower = fb.Task(network(), fb.losses.cross_entropy, layers="2")
    with pytest.raises(MismatchError, match=r"settings differs: .*'layers': None"):
        load_fitted(store, narrower, QUERIES)


def test_the_layers_of_the_task_belong_to_the_rows(tmp_path: Path) -> None:
    narrower = fb.Task(network(), fb.losses.cross_entropy, layers="2")
    store = build_store(METHODS["trak"], narrower, TRAIN, tmp_path, dtype="float32")
    expected = METHODS["trak"].fit(narrower, TRAIN).score(QUERIES).values
    found = load_fitted(store, task(), QUERIES).score(QUERIES).values
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_rows_of_ones_own_have_no_vectors_of_queries(tmp_path: Path) -> None:
    with StoreBuilder.create(tmp_path, Manifest(rows=3, dimension=2)) as builder:
        builder.write(0, torch.ones(3, 2), np.arange(3))
        store = builder.finish()
    with pytest.raises(TaskError, match="was not built from a method"):
        load_fitted(store, task(), QUERIES)


def test_what_needs_the_examples_says_that_they_are_not_there(tmp_path: Path) -> None:
    store = build_store(METHODS["trak"], task(), TRAIN, tmp_path)
    loaded = load_fitted(store, task(), QUERIES)
    with pytest.raises(DataError, match="are not here, only their rows"):
        loaded.train.batch(slice(0, 2))


def test_the_state_says_what_it_belongs_to(tmp_path: Path) -> None:
    method = METHODS["trak"]
    store = build_store(method, task(), TRAIN, tmp_path)
    save_fitted(method.fit(task(), TRAIN), tmp_path)
    about = json.loads((tmp_path / "fitted" / "fitted.json").read_text())
    assert about["method"] == "trak"
    assert about["settings"]["damping"] == 0.05
    assert (about["model"], about["train"]) == (store.manifest.model, store.manifest.train)
    assert about["examples"] == N
