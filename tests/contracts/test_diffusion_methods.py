"""What every registered method for diffusion models keeps: one suite, run for each of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forebear as fb
from forebear.methods import METHODS
from forebear.methods.concept_trak import concepts
from forebear.tasks.diffusion import images
from forebear.tasks.sampling import Guided, Sampler
from tests.denoising_cases import N, Q, case, told_case

SAMPLER = Sampler(steps=4, clip=True)
OPTIONS: dict[str, dict[str, Any]] = {
    "journey_trak": {"sampler": SAMPLER},
    # Ascent alone: an untrained network has little to retain.
    "mucs": {
        "layers": ("last",),
        "retain": False,
        "null": 3.0,
        "batch_size": 20,
        "learning_rate": 1e-2,
    },
    "concept_trak": {
        "sampler": Sampler(steps=20, randomness=0.1, clip=True),
        "draws": 18,
        "scope": "local",
        "dimension": 64,
    },
}
NAMES = [name for name, entry in METHODS.items() if "diffusion models" in entry.modalities]


@dataclass(frozen=True)
class Asked:
    """What a method is tried on: a task, another one of its kind, training images and queries."""

    task: fb.Task
    train: dict
    queries: dict
    other: tuple[fb.Task, dict]


def images_of() -> Asked:
    """Queries are generated, since some methods take no others."""
    task, train, plain = case()
    loss: Any = task.loss
    start = SAMPLER.start(loss, plain["key"], (1, 3, 3)).double()
    made = SAMPLER.sample(Guided(task.model, loss), start)
    return Asked(task, train, images(made, keys=plain["key"]), case(seed=1)[:2])


def concepts_of() -> Asked:
    """Queries are what a condition says beside nothing."""
    task, train, plain = told_case()
    told = plain["condition"]
    queries = concepts(told, 0 * told, keys=plain["key"])
    return Asked(task, train, queries, told_case(seed=1)[:2])


IMAGES, CONCEPTS = images_of(), concepts_of()


def of(name: str) -> Asked:
    return CONCEPTS if METHODS[name].modalities.startswith("conditional") else IMAGES


def get(name: str) -> Any:
    return fb.get(name, **OPTIONS.get(name, {}))


def rows(data: dict, order: Any) -> dict:
    return {name: column[order] for name, column in data.items()}


@pytest.mark.parametrize("name", NAMES)
def test_batch_size_and_order_of_queries_change_no_score(name: str) -> None:
    on = of(name)
    whole = get(name).fit(on.task, on.train).score(on.queries).values
    small = get(name).fit(on.task, on.train, batch_size=5).score(on.queries).values
    torch.testing.assert_close(small, whole, rtol=1e-6, atol=1e-9)
    order = torch.arange(Q).flip(0)
    turned = get(name).fit(on.task, on.train).score(rows(on.queries, order)).values
    torch.testing.assert_close(turned, whole[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_training_examples_only_permutes_scores(name: str) -> None:
    on = of(name)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    scores = get(name).fit(on.task, on.train).score(on.queries).values
    permuted = get(name).fit(on.task, rows(on.train, order)).score(on.queries).values
    torch.testing.assert_close(permuted, scores[:, order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_streamed_top_is_the_sorted_matrix(name: str) -> None:
    on = of(name)
    fitted = get(name).fit(on.task, on.train, batch_size=5)
    scores = fitted.score(on.queries)
    for k in (1, 5, N):
        streamed = fitted.top(on.queries, k=k)
        order = np.argsort(-scores.values.numpy(), 1, kind="stable")
        assert (streamed.ids == order[:, :k]).all()
        assert torch.equal(streamed.values, scores.top(k).values)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_gives_the_same_scores(name: str, tmp_path: Path) -> None:
    on = of(name)
    fitted = get(name).fit(on.task, on.train)
    fitted.save(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = fb.load(tmp_path, on.task, on.train)
    torch.testing.assert_close(loaded.score(on.queries).values, fitted.score(on.queries).values)
    torch.testing.assert_close(loaded.self_influence(), fitted.self_influence())
    other, data = on.other
    with pytest.raises(fb.errors.MismatchError, match="fitted to model"):
        fb.load(tmp_path, other, on.train)
    with pytest.raises(fb.errors.MismatchError, match="training set"):
        fb.load(tmp_path, on.task, data)


@pytest.mark.parametrize("name", NAMES)
def test_scores_state_what_they_are(name: str) -> None:
    on = of(name)
    ids = [f"image-{i}" for i in range(N)]
    fitted = get(name).fit(on.task, on.train, ids=ids)
    scores = fitted.score(on.queries, ids=list("abcd"))
    about = scores.provenance
    assert scores.values.shape == (Q, N)
    assert about.method == name
    assert about.units in ("removal", "ranking")
    assert about.model == on.task.model_hash()
    assert scores.top(3).ids[0, 0] in ids
    assert fitted.self_influence().shape == (N,)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused_by_name(name: str) -> None:
    on = of(name)
    with pytest.raises(fb.errors.DataError, match="the dataset is empty"):
        get(name).fit(on.task, rows(on.train, slice(0, 0)))
    with pytest.raises(fb.errors.DataError, match="'a' stands 2 times"):
        get(name).fit(on.task, on.train, ids=["a", *map(str, range(N - 2)), "a"])
    with pytest.raises(fb.errors.DataError, match=f"k is {N + 1} and there are {N}"):
        get(name).fit(on.task, on.train).top(on.queries, k=N + 1)
    with pytest.raises(fb.errors.UnknownNameError, match="unknown option"):
        fb.get(name, no_such_option=1)
    spoilt = {**on.train, "image": on.train["image"].clone()}
    spoilt["image"][9] = float("nan")
    ids = [f"image-{i}" for i in range(N)]
    with pytest.raises(fb.errors.NonFiniteError, match="image-9"):
        get(name).fit(on.task, spoilt, ids=ids).score(on.queries)
