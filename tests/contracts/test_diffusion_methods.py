"""What every registered method for diffusion models keeps: one suite, run for each of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forebear as fb
from forebear.methods import METHODS
from forebear.tasks.diffusion import images
from forebear.tasks.sampling import Guided, Sampler
from tests.denoising_cases import N, Q, case

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
}
NAMES = [name for name, entry in METHODS.items() if entry.modalities == "diffusion models"]

TASK, TRAIN, PLAIN = case()
START = SAMPLER.start(TASK.loss, PLAIN["key"], (1, 3, 3)).double()  # type: ignore[arg-type]
MADE = SAMPLER.sample(Guided(TASK.model, TASK.loss), START)  # type: ignore[arg-type]
QUERIES = images(MADE, keys=PLAIN["key"])
"""Generated, since some methods take no others."""


def get(name: str) -> Any:
    return fb.get(name, **OPTIONS.get(name, {}))


def rows(data: dict, order: Any) -> dict:
    return {name: column[order] for name, column in data.items()}


@pytest.mark.parametrize("name", NAMES)
def test_batch_size_and_order_of_queries_change_no_score(name: str) -> None:
    whole = get(name).fit(TASK, TRAIN).score(QUERIES).values
    small = get(name).fit(TASK, TRAIN, batch_size=5).score(QUERIES).values
    torch.testing.assert_close(small, whole, rtol=1e-6, atol=1e-9)
    order = torch.arange(Q).flip(0)
    turned = get(name).fit(TASK, TRAIN).score(rows(QUERIES, order)).values
    torch.testing.assert_close(turned, whole[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_training_examples_only_permutes_scores(name: str) -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    scores = get(name).fit(TASK, TRAIN).score(QUERIES).values
    permuted = get(name).fit(TASK, rows(TRAIN, order)).score(QUERIES).values
    torch.testing.assert_close(permuted, scores[:, order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_streamed_top_is_the_sorted_matrix(name: str) -> None:
    fitted = get(name).fit(TASK, TRAIN, batch_size=5)
    scores = fitted.score(QUERIES)
    for k in (1, 5, N):
        streamed = fitted.top(QUERIES, k=k)
        order = np.argsort(-scores.values.numpy(), 1, kind="stable")
        assert (streamed.ids == order[:, :k]).all()
        assert torch.equal(streamed.values, scores.top(k).values)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_gives_the_same_scores(name: str, tmp_path: Path) -> None:
    fitted = get(name).fit(TASK, TRAIN)
    fitted.save(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = fb.load(tmp_path, TASK, TRAIN)
    torch.testing.assert_close(loaded.score(QUERIES).values, fitted.score(QUERIES).values)
    torch.testing.assert_close(loaded.self_influence(), fitted.self_influence())
    other, data, _ = case(seed=1)
    with pytest.raises(fb.errors.MismatchError, match="fitted to model"):
        fb.load(tmp_path, other, TRAIN)
    with pytest.raises(fb.errors.MismatchError, match="training set"):
        fb.load(tmp_path, TASK, data)


@pytest.mark.parametrize("name", NAMES)
def test_scores_state_what_they_are(name: str) -> None:
    ids = [f"image-{i}" for i in range(N)]
    fitted = get(name).fit(TASK, TRAIN, ids=ids)
    scores = fitted.score(QUERIES, ids=list("abcd"))
    about = scores.provenance
    assert scores.values.shape == (Q, N)
    assert about.method == name
    assert about.units in ("removal", "ranking")
    assert about.model == TASK.model_hash()
    assert scores.top(3).ids[0, 0] in ids
    assert fitted.self_influence().shape == (N,)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused_by_name(name: str) -> None:
    with pytest.raises(fb.errors.DataError, match="the dataset is empty"):
        get(name).fit(TASK, rows(TRAIN, slice(0, 0)))
    with pytest.raises(fb.errors.DataError, match="'a' stands 2 times"):
        get(name).fit(TASK, TRAIN, ids=["a", *map(str, range(N - 2)), "a"])
    with pytest.raises(fb.errors.DataError, match=f"k is {N + 1} and there are {N}"):
        get(name).fit(TASK, TRAIN).top(QUERIES, k=N + 1)
    with pytest.raises(fb.errors.UnknownNameError, match="unknown option"):
        fb.get(name, no_such_option=1)
    spoilt = {**TRAIN, "image": TRAIN["image"].clone()}
    spoilt["image"][9] = float("nan")
    ids = [f"image-{i}" for i in range(N)]
    with pytest.raises(fb.errors.NonFiniteError, match="image-9"):
        get(name).fit(TASK, spoilt, ids=ids).score(QUERIES)
