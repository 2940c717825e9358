"""Diffusion tasks of the zoo: which images, whose noise, and networks that learn."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from forebear.errors import DataError, MissingDependencyError, UnknownNameError
from forebear.zoo import digits_diffusion, fashion_diffusion
from forebear.zoo.pictures import QUERY_KEYS, half_subsets


def test_digits_are_scaled_and_in_numpys_order() -> None:
    data = digits_diffusion.load(train=30, queries=7)
    order = np.random.RandomState(0).permutation(1797)
    pixels, labels = load_digits(return_X_y=True)
    expected = np.asarray(pixels)[order[:30]].reshape(30, 1, 8, 8) / 8 - 1
    batch = data.train.batch(slice(None))
    np.testing.assert_allclose(batch["image"].numpy(), expected, rtol=1e-6)
    held_out = np.asarray(labels)[order[30:37]]
    assert data.query_labels.tolist() == held_out.tolist()
    assert batch["image"].dtype == torch.float32
    assert "condition" not in batch
    assert data.shape == (1, 8, 8)


def test_queries_have_noise_of_their_own() -> None:
    data = digits_diffusion.load(train=30, queries=7)
    keys = data.queries.batch(slice(None))["key"]
    assert keys.tolist() == list(range(QUERY_KEYS, QUERY_KEYS + 7))
    assert data.train.batch(slice(None))["key"].tolist() == list(range(30))


def test_too_many_digits_are_refused() -> None:
    with pytest.raises(DataError, match="has 1797 images"):
        digits_diffusion.load(train=1790, queries=8)


@pytest.mark.parametrize(("kind", "parameters"), [("epsilon", 181_312), ("x0", 82_624)])
def test_a_short_training_lowers_the_loss(kind: digits_diffusion.Kind, parameters: int) -> None:
    data = digits_diffusion.load(train=200, queries=20)
    recipe, loss = digits_diffusion.recipe(kind, epochs=15), digits_diffusion.loss(kind, levels=5)
    torch.manual_seed(0)
    untrained, trained = recipe.build(), recipe.train(data.train)
    assert sum(p.numel() for p in trained.parameters()) == parameters
    batch = data.queries.batch(slice(None))
    with torch.no_grad():
        assert loss(trained, batch).mean() < 0.9 * loss(untrained, batch).mean()


def test_full_training_has_the_steps_of_the_reference() -> None:
    kinds: dict[digits_diffusion.Kind, int] = {"epsilon": 3200, "x0": 3000}
    for kind, steps in kinds.items():
        epochs = digits_diffusion.recipe(kind).epochs
        assert epochs * -(-1000 // 128) == steps
        assert epochs * -(-500 // 128) == steps / 2


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="epsilon"):
        digits_diffusion.recipe("epsilo")  # type: ignore[arg-type]


def test_halves_are_numpys() -> None:
    masks = half_subsets(1000, 3)
    random = np.random.RandomState(7)
    for mask in masks:
        assert set(torch.nonzero(mask)[:, 0].tolist()) == set(random.permutation(1000)[:500])


@pytest.fixture
def clothes(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (12, 28, 28)).astype(np.uint8)
    labels = random.integers(0, 10, 12).astype(np.uint8)
    for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
        path = tmp_path / f"train-{name}-ubyte.gz"
        path.write_bytes(gzip.compress(header + values.tobytes()))
    return tmp_path, pixels, labels


def test_clothes_are_made_small_and_told_their_class(
    clothes: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    folder, pixels, labels = clothes
    data = fashion_diffusion.load(train=8, queries=3, folder=folder)
    order = np.random.RandomState(0).permutation(12)
    batch = data.train.batch(slice(None))
    corner = pixels[order[0], :2, :2].astype(float).mean() / 127.5 - 1
    assert batch["image"].shape == (8, 1, 14, 14)
    assert batch["image"][0, 0, 0, 0].item() == pytest.approx(corner, rel=1e-5)
    assert batch["condition"].tolist() == labels[order[:8]].tolist()
    assert data.query_labels.tolist() == labels[order[8:11]].tolist()


def test_the_transformer_takes_them(clothes: tuple[Path, np.ndarray, np.ndarray]) -> None:
    data = fashion_diffusion.load(train=8, queries=3, folder=clothes[0])
    model = fashion_diffusion.recipe(epochs=1).train(data.train)
    loss = fashion_diffusion.loss(levels=2)
    assert loss(model, data.queries.batch(slice(None))).shape == (3,)
    assert sum(p.numel() for p in model.parameters()) < 500_000


def test_missing_clothes_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="apt-get install"):
        fashion_diffusion.load(folder=tmp_path)
