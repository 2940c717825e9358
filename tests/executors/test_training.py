"""Retraining, further training and stores of features elsewhere, bit for bit as here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.executors import Work
from forebear.methods.features import build_store
from forebear.training import GroundTruth, Recipe, half_subsets, truth

EXECUTORS = {"processes": fb.Processes(workers=2), "ray": fb.Ray(workers=2)}
N, WIDTH = 60, 6


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Any:
    if request.param == "ray":
        pytest.importorskip("ray")
    return EXECUTORS[request.param]


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


TRAIN, QUERIES = points(N, 0), points(7, 1)


def recipe() -> Recipe:
    width = WIDTH  # a closure: what is sent must be what it holds now

    return Recipe(
        lambda: nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 2)),
        lambda model, batch: nn.functional.cross_entropy(
            model(batch[0]), batch[1], reduction="none", label_smoothing=0.01
        ),
        learning_rate=0.3,
        epochs=12,  # 48 steps, enough for the stacked ones to be traced
        batch_size=8,
    )


def test_retraining(executor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(truth, "PIECE", 4)
    arguments: dict[str, Any] = {"subsets": half_subsets(N, 7), "seeds": 2}
    here = GroundTruth.collect(recipe(), TRAIN, QUERIES, **arguments)
    there = GroundTruth.collect(
        recipe(), TRAIN, QUERIES, **arguments, folder=tmp_path, executor=executor
    )
    assert len(list(tmp_path.glob("piece-*"))) == 4
    assert torch.equal(there.outcomes, here.outcomes)
    assert here.full is not None
    assert there.full is not None
    assert torch.equal(there.full, here.full)


def test_retraining_by_a_callable() -> None:
    own = recipe()

    def train(subset: Tensor, seed: int) -> nn.Module:
        return own.with_settings(epochs=2).train(TRAIN, subset, seed)

    arguments: dict[str, Any] = {"subsets": half_subsets(N, 3), "seeds": 1, "loss": own.loss}
    here = GroundTruth.collect(train, TRAIN, QUERIES, **arguments)
    there = GroundTruth.collect(train, TRAIN, QUERIES, **arguments, executor=EXECUTORS["processes"])
    assert torch.equal(there.outcomes, here.outcomes)


def test_further_training(executor: Any) -> None:
    torch.manual_seed(3)
    task = fb.Task(recipe().build().eval(), fb.losses.cross_entropy)
    settings = fb.FurtherTraining(
        learning_rate=0.1, batch_size=8, amounts=(1, 3), seeds=2, max_seeds=None
    )
    here = settings.measure(task, TRAIN, QUERIES)  # 61 runs: two parts
    there = settings.measure(task, TRAIN, QUERIES, executor=executor)
    assert torch.equal(there.outcomes, here.outcomes)
    assert torch.equal(there.full, here.full)


def test_a_store_is_the_same_bytes(executor: Any, tmp_path: Path) -> None:
    torch.manual_seed(4)
    task = fb.Task(recipe().build().eval(), fb.losses.cross_entropy)
    arguments: dict[str, Any] = {
        "shard_rows": 13,
        "batch_size": 8,
        "ids": [f"z{i}" for i in range(N)],
        "columns": {"label": TRAIN[1]},
    }
    method = fb.TRAK(dimension=16)
    build_store(method, task, TRAIN, tmp_path / "here", **arguments)
    store = build_store(method, task, TRAIN, tmp_path / "there", **arguments, executor=executor)
    assert len(store) == N

    def content(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    assert content("there") == content("here")


@dataclass(frozen=True)
class Untidy(fb.InProcess):
    """A worker of it was killed while it wrote."""

    folder: Path

    def run(self, work: Work) -> None:
        super().run(work)
        (self.folder / "shard-000001.safetensors.elsewhere-1.partial").touch()


def test_what_a_killed_worker_left_is_not_part_of_a_store(tmp_path: Path) -> None:
    torch.manual_seed(4)
    task = fb.Task(recipe().build().eval(), fb.losses.cross_entropy)
    build_store(fb.Similarity(), task, TRAIN, tmp_path, executor=Untidy(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        "shard-000000.safetensors",
    ]


def test_a_store_of_embeddings_too(tmp_path: Path) -> None:
    torch.manual_seed(4)
    task = fb.Task(recipe().build().eval(), fb.losses.cross_entropy)
    stores = [
        build_store(fb.Similarity(), task, TRAIN, tmp_path / name, shard_rows=25, executor=executor)
        for name, executor in {"here": None, "there": EXECUTORS["processes"]}.items()
    ]
    assert torch.equal(stores[0].rows(range(N)), stores[1].rows(range(N)))
