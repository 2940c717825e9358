"""What an index says of its recall is what numpy counts, where it is high and where it is not."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_stores import DIMENSION, draw, strongest, write_store
from torch import Tensor

from forebear import index
from forebear.errors import NumericalWarning
from forebear.index import Recall, StoredIndex
from forebear.store import Store

HASTY: dict[str, dict[str, Any]] = {
    "ivf": {"lists": 50, "probes": 4},
    "pq": {"lists": 50, "probes": 4, "parts": 2, "refine": 1.5},
    "hnsw": {"links": 2, "construction": 4, "breadth": 20},
}


def shares(built: StoredIndex, store: Store, queries: Tensor, k: int) -> np.ndarray:
    found = built.search(queries, k).positions.tolist()
    exact = strongest(store, queries, k)[0].tolist()
    return np.array([len({*one} & {*other}) / k for one, other in zip(found, exact, strict=True)])


def clustered(rows: int, seed: int) -> Tensor:
    centres = 4 * draw(20, DIMENSION, seed=1)
    which = torch.randint(20, (rows,), generator=torch.Generator().manual_seed(seed))
    return centres[which] + 0.3 * draw(rows, DIMENSION, seed=seed)


@pytest.mark.parametrize("kind", HASTY)
def test_recall_on_isotropic_rows_is_low_and_said_to_be(kind: str, store: Store) -> None:
    queries = draw(40, DIMENSION, seed=6)
    built = index.build(store, kind, queries=queries, k=20, **HASTY[kind])
    expected = shares(built, store, queries, 20)
    assert built.recall.mean == pytest.approx(expected.mean(), abs=1e-12)
    assert built.recall.mean < 0.9
    # Half of the width of the interval is two standard errors, more or less.
    error = expected.std() / 40**0.5
    assert built.recall.high - built.recall.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert built.recall.low < built.recall.mean < built.recall.high
    assert not built.recall.sampled
    assert index.open(store, kind).recall == built.recall
    assert built.measure(queries, 20) == built.recall


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_recall_on_clustered_rows_is_high(kind: str, tmp_path: Path) -> None:
    store = write_store(tmp_path, clustered(2000, 2), dtype="float32")
    queries = clustered(40, 3)
    built = index.build(store, kind, queries=queries, k=20)
    assert built.recall.mean == pytest.approx(shares(built, store, queries, 20).mean(), abs=1e-12)
    assert built.recall.mean > 0.98


def test_recall_of_opponents_is_measured_apart(store: Store) -> None:
    built = index.build(store, "ivf", **HASTY["ivf"])
    queries = draw(30, DIMENSION, seed=8)
    found = built.search(queries, 10, opponents=True).positions.tolist()
    exact = strongest(store, queries, 10, opponents=True)[0].tolist()
    expected = [len({*one} & {*other}) / 10 for one, other in zip(found, exact, strict=True)]
    measured = built.measure(queries, 10, opponents=True)
    assert measured.mean == pytest.approx(np.mean(expected), abs=1e-12)
    assert measured != built.measure(queries, 10)


def test_rows_are_sampled_where_no_queries_are_given(store: Store) -> None:
    built = index.build(store, "ivf", sample=50, k=10, seed=3, **HASTY["ivf"])
    assert (built.recall.queries, built.recall.k, built.recall.sampled) == (50, 10, True)
    chosen = np.random.default_rng(3).choice(len(store), 50, replace=False)
    expected = shares(built, store, store.rows(chosen), 10)
    assert built.recall.mean == pytest.approx(expected.mean(), abs=1e-12)


def test_equal_rows_count_for_each_other(tmp_path: Path) -> None:
    store = write_store(tmp_path, torch.ones(400, 4))
    built = index.build(store, "hnsw", k=10)
    assert built.recall.mean == 1.0


def test_recall_is_a_sentence() -> None:
    recall = Recall(k=100, mean=0.7132, low=0.681, high=0.752, queries=64)
    assert str(recall) == (
        "finds 71.3% (68 to 75) of the exact top 100, measured on 64 sampled rows"
    )
    assert str(Recall(5, 1.0, 1.0, 1.0, 8, sampled=False)).endswith("measured on 8 queries")


@pytest.mark.parametrize("kind", HASTY)
def test_effort_is_doubled_until_the_recall_is_reached(kind: str, store: Store) -> None:
    more = HASTY[kind] | ({"links": 4, "construction": 20} if kind == "hnsw" else {})
    hasty = index.build(store, kind, k=20, **more)
    assert hasty.recall.mean < 0.9
    built = index.build(store, kind, k=20, recall_at_least=0.9, **more)
    assert built.recall.mean >= 0.9
    assert [trial.recall >= 0.9 for trial in built.trials].count(True) == 1
    assert built.trials[0].recall == hasty.recall.mean
    assert built.trials[-1].recall == built.recall.mean
    name = "breadth" if kind == "hnsw" else "probes"
    efforts = [trial.settings[name] for trial in built.trials]
    most = 50 if kind != "hnsw" else len(store)
    assert efforts == [min(efforts[0] * 2**i, most) for i in range(len(efforts))]
    assert built.settings[name] == efforts[-1]
    if kind == "pq":  # all lists were not enough: more candidates were
        refined = [
            trial.settings["refine"] for trial in built.trials if trial.settings[name] == most
        ]
        assert refined == [1.5 * 2**i for i in range(len(refined))]
        assert len(refined) > 1
    assert re.fullmatch(
        rf"{name} \d+.*: recall 0\.\d+ in \S+ s, exact search \S+ s", str(built.trials[0])
    )
    opened = index.open(store, kind)
    queries = draw(5, DIMENSION, seed=4)
    assert (opened.search(queries, 9).positions == built.search(queries, 9).positions).all()


def test_a_recall_that_cannot_be_reached_is_said(store: Store) -> None:
    with pytest.warns(NumericalWarning, match="and 1.0 was asked for"):
        built = index.build(store, "pq", bits=1, parts=1, lists=1, k=1, recall_at_least=1.0)
    assert built.recall.mean < 1
    assert index.open(store, "pq").recall == built.recall
