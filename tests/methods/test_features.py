"""Stored features against the scores of the methods they belong to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forebear as fb
from forebear.curvature import Dense, Identity
from forebear.errors import DataError, MismatchError, TaskError
from forebear.methods.features import build_store, query_features
from forebear.methods.stored import fit_store
from forebear.projections import Gaussian, TwoSided
from tests.methods.test_influence import LOSS, QUERIES, TRAIN, N, network

CHECKPOINTS = [network(seed).state_dict() for seed in (1, 2, 3)]
METHODS = {
    "trak": fb.TRAK(dimension=16, projection="gaussian", damping=0.05),
    "trak tensor sketch": fb.TRAK(dimension=16, damping=0.1, seed=3),
    "two-sided": fb.Influence(
        projection=TwoSided(12), curvature=Dense(kind="fisher", blocks="layers"), units="removal"
    ),
    "graddot": fb.Influence(projection=Gaussian(16), curvature=Identity()),
    "similarity": fb.Similarity(),
    "similarity dot": fb.Similarity(metric="dot"),
}
ROUNDING = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "int8": 4e-2}


def task(checkpoints: Any = None) -> fb.Task:
    return fb.Task(network().float(), LOSS, checkpoints=checkpoints)


def singles(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch[0].float(), batch[1]


TRAIN32, QUERIES32 = singles(TRAIN), singles(QUERIES)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_products_with_stored_rows_are_the_scores(name: str, dtype: Any, tmp_path: Path) -> None:
    method = METHODS[name]
    store = build_store(method, task(), TRAIN32, tmp_path, dtype=dtype, shard_rows=5)
    fitted = method.fit(task(), TRAIN32)
    expected = fitted.score(QUERIES32).values
    scores = query_features(fitted, QUERIES32) @ store.rows(range(N)).T
    assert distance(scores, expected) < ROUNDING[dtype]


def test_checkpoints_stand_side_by_side_in_a_row(tmp_path: Path) -> None:
    method = METHODS["trak"]
    some = task(CHECKPOINTS)
    store = build_store(method, some, TRAIN32, tmp_path, dtype="float32", shard_rows=4)
    assert store.dimension == 3 * 16
    fitted = method.fit(some, TRAIN32)
    expected = fitted.score(QUERIES32).values
    scores = query_features(fitted, QUERIES32) @ store.rows(range(N)).T
    assert distance(scores, expected) < 1e-5
    stored = fit_store(method, some, TRAIN32, store)
    assert distance(stored.score(QUERIES32).values, expected) < 1e-4
    assert distance(stored.self_influence(), fitted.self_influence()) < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_a_method_fitted_to_its_store_gives_the_scores_of_one_fitted_to_the_data(
    name: str, tmp_path: Path
) -> None:
    method = METHODS[name]
    store = build_store(method, task(), TRAIN32, tmp_path, dtype="float32", shard_rows=7)
    fitted, stored = method.fit(task(), TRAIN32), fit_store(method, task(), TRAIN32, store)
    expected = fitted.score(QUERIES32).values
    assert distance(stored.score(QUERIES32).values, expected) < 1e-4
    scores = query_features(stored, QUERIES32) @ store.rows(range(N)).T
    assert distance(scores, expected) < 1e-4
    assert stored.top(QUERIES32, 3).ids.tolist() == fitted.top(QUERIES32, 3).ids.tolist()
    assert distance(stored.self_influence(), fitted.self_influence()) < 1e-4


def test_the_model_is_not_run_again_on_the_training_set(tmp_path: Path) -> None:
    method = METHODS["trak"]
    store = build_store(method, task(), TRAIN32, tmp_path, dtype="float32")
    some = task()
    seen: list[int] = []
    some.model.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    fit_store(method, some, TRAIN32, store).self_influence()
    assert sum(seen) < N  # the check of the layers looks at a few


def test_batches_and_shards_change_nothing_but_rounding(tmp_path: Path) -> None:
    kept = []
    for size, batch in ((3, 2), (100, 512)):
        folder = tmp_path / str(size)
        store = build_store(
            METHODS["trak"], task(), TRAIN32, folder,
            dtype="float32", shard_rows=size, batch_size=batch,
        )  # fmt: skip
        kept.append(store.rows(range(N)))
    assert distance(*kept) < 1e-5


def test_another_model_dataset_or_method_is_refused(tmp_path: Path) -> None:
    method = METHODS["trak"]
    store = build_store(method, task(), TRAIN32, tmp_path)
    other = fb.Task(network(5).float(), LOSS)
    with pytest.raises(MismatchError, match="model differs"):
        build_store(method, other, TRAIN32, tmp_path)
    with pytest.raises(MismatchError, match="model differs"):
        fit_store(method, other, TRAIN32, store)
    changed = (TRAIN32[0] + 1, TRAIN32[1])
    with pytest.raises(MismatchError, match="train differs"):
        build_store(method, task(), changed, tmp_path)
    with pytest.raises(MismatchError, match="settings differs"):
        fit_store(fb.TRAK(dimension=16, projection="gaussian"), task(), TRAIN32, store)
    cosine = fb.Influence(projection=Gaussian(16), normalise="cosine")
    with pytest.raises(TaskError, match=r"normalise='cosine' cannot be stored"):
        build_store(cosine, task(), TRAIN32, tmp_path)
    with pytest.raises(TaskError, match="ekfac has no vector for each example to store"):
        build_store(fb.EKFAC(), task(), TRAIN32, tmp_path)


def test_ids_and_columns_are_kept(tmp_path: Path) -> None:
    names = [f"z{i}" for i in range(N)]
    columns = {"label": TRAIN32[1], "source": np.asarray(["a", "b"])[np.arange(N) % 2]}
    store = build_store(
        METHODS["similarity"], task(), TRAIN32, tmp_path, ids=names, columns=columns
    )
    assert store.ids.tolist() == names
    assert store.column("label").tolist() == TRAIN32[1].tolist()
    assert store.column("source").tolist() == columns["source"].tolist()
    with pytest.raises(DataError, match="column 'label' has 2 values"):
        build_store(METHODS["similarity"], task(), TRAIN32, tmp_path, columns={"label": [1, 2]})
