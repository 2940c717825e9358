"""Likeness of pixels and of an encoder's features, by hand and wherever methods go."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn

import forebear as fb
from forebear.methods.pixels import distances
from forebear.methods.stored import load_fitted
from forebear.tasks.diffusion import images
from tests.denoising_cases import N, Q, case

TASK, TRAIN, QUERIES = case()


def flat(data: dict) -> np.ndarray:
    return data["image"].flatten(1).double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 1 - cdist(a, b, "cosine")


def moments(pixels: Tensor) -> Tensor:
    """An encoder: mean and deviation of each image."""
    rows = pixels.flatten(1)
    return torch.stack([rows.mean(1), rows.std(1)], 1)


@pytest.mark.parametrize("metric", ["distance", "cosine"])
def test_pixels_are_compared_without_a_model(metric: Any) -> None:
    by_hand = cosine if metric == "cosine" else lambda a, b: -cdist(a, b)
    expected = by_hand(flat(QUERIES), flat(TRAIN))
    fitted = fb.get("pixels", metric=metric).fit(TASK, TRAIN)
    scores = fitted.score(QUERIES)
    np.testing.assert_allclose(scores.values, expected, rtol=1e-10)
    assert scores.provenance.coverage is None
    assert scores.provenance.model == TASK.model_hash()
    alone = fb.Pixels(metric=metric).fit(None, {"image": TRAIN["image"]}, batch_size=5)
    torch.testing.assert_close(alone.score(QUERIES).values, scores.values)
    own = fitted.score(TRAIN).values.diagonal()
    torch.testing.assert_close(fitted.self_influence().double(), own)


def test_columns_of_a_tuple_and_bytes_are_images_too() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (9, 1, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.zeros(9, dtype=torch.long)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    task = fb.Task(model, fb.losses.cross_entropy)
    for train in (
        (pixels, labels),
        (pixels.float(), labels),
        torch.utils.data.TensorDataset(pixels),
    ):
        scores = fb.Pixels().fit(task, train).score(train)
        rows = pixels.flatten(1).double().numpy()
        np.testing.assert_allclose(scores.values, -cdist(rows, rows), rtol=1e-6)
        assert scores.values.dtype == torch.float32


def test_short_distances_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = 5 + torch.rand(40, 3000, generator=generator, dtype=torch.float64)
    steps = torch.logspace(-9, -1, 40, dtype=torch.float64)[:, None]
    near = rows + steps * torch.randn(40, 3000, generator=generator, dtype=torch.float64)
    found = distances(torch.cat([near, rows]), rows)
    expected = -torch.from_numpy(cdist(torch.cat([near, rows]), rows))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    assert (found[40:].diagonal() == 0).all()


def test_many_queries_are_compared_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fb.Pixels().fit(TASK, TRAIN)
    expected, top = whole.score(QUERIES).values, whole.top(QUERIES, k=3)
    monkeypatch.setattr("forebear.methods.pixels.QUERY_NUMBERS", 2 * whole.numbers)
    torch.testing.assert_close(whole.score(QUERIES).values, expected)
    assert (whole.top(QUERIES, k=3).ids == top.ids).all()


def test_images_that_cannot_be_compared_are_refused() -> None:
    fitted = fb.Pixels().fit(TASK, TRAIN)
    wide = images(torch.zeros(2, 1, 4, 4).double())
    with pytest.raises(fb.errors.DataError, match=r"\(1, 4, 4\).*\(1, 3, 3\): prepare both"):
        fitted.score(wide)
    mixed = [*TRAIN["image"], wide["image"][0]]
    with pytest.raises(fb.errors.DataError, match="have 9 and 16 numbers: give them one size"):
        fb.Pixels().fit(None, fb.Data(mixed), batch_size=1).score(QUERIES["image"])
    with pytest.raises(fb.errors.DataError, match=r"first column is int64: images are"):
        fb.Pixels().fit(None, (torch.zeros(3, 4).long(), torch.zeros(3)))
    with pytest.raises(fb.errors.DataError, match=r"has pixels and no 'image': make it"):
        fb.Pixels().fit(None, {"pixels": TRAIN["image"]})
    with pytest.raises(fb.errors.DataError, match=r"reach up to .*scale them .*\(ids 0, 1"):
        fitted.score({**QUERIES, "image": QUERIES["image"] + 255})
    broken = {**TRAIN, "image": TRAIN["image"].clone()}
    broken["image"][7, 0, 1, 1] = float("nan")
    with pytest.raises(fb.errors.NonFiniteError, match="ids 7"):
        fb.Pixels().fit(TASK, broken).score(QUERIES)


@pytest.mark.parametrize("metric", ["cosine", "dot", "distance"])
def test_an_encoder_takes_the_place_of_hidden_states(metric: Any, tmp_path: Path) -> None:
    mine, train = (moments(data["image"]).numpy() for data in (QUERIES, TRAIN))
    expected = {
        "cosine": cosine,
        "dot": lambda a, b: a @ b.T,
        "distance": lambda a, b: -cdist(a, b),
    }
    method = fb.get("similarity", features=moments, metric=metric)
    fitted = method.fit(TASK, TRAIN, batch_size=5)
    scores = fitted.score(QUERIES)
    np.testing.assert_allclose(scores.values, expected[metric](mine, train), rtol=1e-9)
    assert "moments" in str(scores.provenance.settings["features"])
    own = fitted.score(TRAIN).values.diagonal()
    torch.testing.assert_close(fitted.self_influence(), own)
    plain = (TRAIN["image"], torch.zeros(N))
    again = method.fit(TASK, plain).score((QUERIES["image"], torch.zeros(Q)))
    torch.testing.assert_close(again.values, scores.values)
    fitted.save(tmp_path)
    loaded = fb.load(tmp_path, TASK, TRAIN, method=method)
    torch.testing.assert_close(loaded.score(QUERIES).values, scores.values)
    with pytest.raises(fb.errors.FormatError, match=r"'moments'.*pass .* with method="):
        fb.load(tmp_path, TASK, TRAIN)
    other = {"embeddings": fitted.tensors()["embeddings"].flip(1)}
    with pytest.raises(fb.errors.MismatchError, match="those of another function"):
        method.restore(TASK, fb.Data(TRAIN), other)


def test_features_go_to_stores_and_distances_do_not(tmp_path: Path) -> None:
    method = fb.Similarity(features=moments)
    store = fb.build_store(method, TASK, TRAIN, tmp_path / "store", dtype="float32")
    assert store.manifest.dimension == 2
    fitted = method.fit(TASK, TRAIN)
    stored = load_fitted(store, TASK, QUERIES, method=method)
    expected, found = fitted.score(QUERIES).values, stored.score(QUERIES).values
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (stored.top(QUERIES, k=3).ids == fitted.top(QUERIES, k=3).ids).all()
    with pytest.raises(fb.errors.TaskError, match="similarity has no vector for each example"):
        fb.build_store(fb.Similarity(metric="distance"), TASK, TRAIN, tmp_path / "other")


def test_methods_of_likeness_combine_and_make_shortlists() -> None:
    members = [fb.Pixels(), fb.Similarity(features=moments), fb.Similarity()]
    scores = [member.fit(TASK, TRAIN).score(QUERIES) for member in members]
    assert torch.isfinite(fb.combine(scores).values).all()
    cascade = fb.Cascade([fb.Pixels(), fb.GradDot()], keep=[5]).fit(TASK, TRAIN)
    found = cascade.top(QUERIES, k=3, opponents=True)
    near = scores[0].top(5).ids  # no opponents among pixels: the nearest are kept
    assert all(set(mine) <= set(kept) for mine, kept in zip(found.ids, near, strict=True))


def test_features_that_make_no_sense_are_refused() -> None:
    with pytest.raises(fb.errors.TaskError, match=r"features is 'pixels': .* use fb.Pixels\(\)"):
        fb.Similarity(features="pixels")
    with pytest.raises(fb.errors.TaskError, match="layer and level say which hidden states"):
        fb.Similarity(features=moments, level=50)
    for wrong in (lambda pixels: pixels.mean(), lambda pixels: None, lambda pixels: pixels[:1]):
        with pytest.raises(fb.errors.TaskError, match=r"features= gives a .*must give a tensor"):
            fb.Similarity(features=wrong).fit(TASK, TRAIN)  # type: ignore[arg-type]
    with pytest.raises(fb.errors.NonFiniteError, match="the feature is NaN or infinite"):
        fb.Similarity(features=lambda pixels: moments(pixels) / 0).fit(TASK, TRAIN)
