import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from forebear import zoo
from forebear.errors import DataError, FormatError, MissingDependencyError, UnknownNameError
from forebear.zoo import breast_cancer, diabetes, digits, fashion_mnist, text
from forebear.zoo.images import flip_labels
from forebear.zoo.tables import network, split_table


@pytest.mark.parametrize("name", zoo.TASKS)
def test_every_task_has_data_and_a_recipe(name: str) -> None:
    module = zoo.get(name)
    assert callable(module.load)
    assert module.recipe().settings["epochs"] > 0


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'digits'"):
        zoo.get("digit")


def test_digits_are_split_without_overlap_and_standardised() -> None:
    data = digits.load(train=1000, queries=50)
    x, y = data.train.batch(slice(None))
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert abs(float(x.mean())) < 1e-4
    assert float(x.std()) == pytest.approx(1, abs=1e-3)
    assert (len(data.train), len(data.test), len(data.queries)) == (1000, 797, 50)
    every = torch.cat([x, data.test.batch(slice(None))[0]])
    # scikit-learn's own pixels, in whichever order, up to scale and shift
    ours = (every - every.min()) / (every.max() - every.min()) * 255
    theirs = np.minimum(load_digits().data * 16, 255)
    np.testing.assert_allclose(
        np.sort(ours.double().sum(1)), np.sort(theirs.sum(1)), rtol=1e-4, atol=0.1
    )
    assert len(np.unique(every.numpy(), axis=0)) == len(np.unique(theirs, axis=0))


def test_thumbnails_are_the_inputs() -> None:
    data = digits.load(queries=10)
    x = data.queries.batch(slice(None))[0].numpy()
    pixels = data.query_images.reshape(10, -1)
    assert pixels.dtype == np.uint8
    assert np.corrcoef(x.ravel(), pixels.ravel())[0, 1] == pytest.approx(1)
    assert data.train_images.shape == (1297, 8, 8)


def test_flipped_labels_are_always_wrong_and_every_other_class_occurs() -> None:
    labels = torch.arange(5000) % 10
    wrong, flipped = flip_labels(labels, 0.2, seed=3)
    assert int(flipped.sum()) == 1000
    assert torch.equal(wrong != labels, flipped)
    shifts = ((wrong - labels) % 10)[flipped].bincount(minlength=10)
    assert shifts[0] == 0
    assert shifts[1:].min() > 70  # 111 expected of each
    again, _ = flip_labels(labels, 0.2, seed=3)
    other, _ = flip_labels(labels, 0.2, seed=4)
    assert torch.equal(wrong, again)
    assert not torch.equal(wrong, other)


def test_flipping_changes_labels_and_nothing_else() -> None:
    clean = digits.load(train=200)
    dirty = clean.with_flipped_labels(0.05, seed=0)
    assert not clean.flipped.any()
    assert int(dirty.flipped.sum()) == 10
    (x, y), (x2, y2) = clean.train.batch(slice(None)), dirty.train.batch(slice(None))
    assert torch.equal(x, x2)
    assert torch.equal(y != y2, dirty.flipped)
    assert clean.train.fingerprint != dirty.train.fingerprint


@pytest.mark.parametrize(("fraction", "classes"), [(1.5, 10), (0.1, 1)])
def test_impossible_flips_are_refused(fraction: float, classes: int) -> None:
    with pytest.raises(DataError):
        flip_labels(torch.zeros(10, dtype=torch.int64), fraction, classes=classes)


def test_more_images_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match="digits has 1797 images"):
        digits.load(train=1797)


def test_the_digits_recipe_reaches_95_percent_in_spite_of_wrong_labels() -> None:
    data = digits.load().with_flipped_labels(0.05)
    assert data.accuracy(digits.recipe().train(data.train)) >= 0.95


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, size in (("train", 30), ("t10k", 12)):
        images = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        labels = np.arange(size, dtype=np.uint8) % 10
        images[:, 0, 0] = labels  # each image carries its label
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return tmp_path


def test_idx_files_are_read_with_images_and_labels_together(folder: Path) -> None:
    data = fashion_mnist.load(train=20, queries=5, folder=folder)
    labels = data.train.batch(slice(None))[1].numpy()
    np.testing.assert_array_equal(data.train_images[:, 0, 0], labels)
    assert labels.tolist() != (np.arange(20) % 10).tolist()  # a random part
    np.testing.assert_array_equal(data.query_images[:, 0, 0], np.arange(5))
    assert len(data.test) == 12


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def other_type(content: bytes) -> bytes:
    raw = bytearray(gzip.decompress(content))
    raw[2] = 13
    return gzip.compress(bytes(raw))


def short(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content)[:-1])


def not_gzip(content: bytes) -> bytes:
    return b"<html>not found</html>"


@pytest.mark.parametrize("damage", [cut, other_type, short, not_gzip])
def test_a_damaged_file_is_named_with_the_remedy(damage, folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match=r"train-images.*apt-get install dataset-fashion-mnist"):
        fashion_mnist.load(train=20, queries=5, folder=folder)


def test_labels_of_other_images_are_refused(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(3, dtype=np.uint8)))
    with pytest.raises(FormatError, match="do not belong together"):
        fashion_mnist.load(train=20, queries=5, folder=folder)


def test_a_missing_file_is_named_with_the_remedy(folder: Path) -> None:
    assert fashion_mnist.available(folder)
    (folder / "t10k-images-idx3-ubyte.gz").unlink()
    assert not fashion_mnist.available(folder)
    with pytest.raises(MissingDependencyError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.load(train=20, queries=5, folder=folder)


@pytest.mark.skipif(not fashion_mnist.available(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_has_its_published_size_and_balance() -> None:
    data = fashion_mnist.load(train=60000)
    labels = data.train.batch(slice(None))[1]
    assert data.train_images.shape == (60000, 28, 28)
    assert labels.bincount().tolist() == [6000] * 10
    assert len(data.test) == 10000


@pytest.mark.parametrize("module", [breast_cancer, diabetes])
def test_tables_are_split_and_standardised_as_scikit_learn_does(module) -> None:
    from sklearn.datasets import load_breast_cancer, load_diabetes
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    loaded = (load_breast_cancer if module is breast_cancer else load_diabetes)()
    rows, held_out, target, _ = train_test_split(
        loaded.data, loaded.target, test_size=0.1, random_state=0
    )
    scaler = StandardScaler().fit(rows)
    data = module.load()
    x, y = data.train.batch(slice(None))
    np.testing.assert_allclose(x, scaler.transform(rows), atol=1e-5)
    np.testing.assert_allclose(
        data.test.batch(slice(None))[0], scaler.transform(held_out), atol=1e-5
    )
    if data.classes:
        np.testing.assert_array_equal(y, target)
    else:
        np.testing.assert_allclose(y, (target - target.mean()) / target.std(), atol=1e-5)
    assert len(data.features) == x.shape[1]


def test_a_constant_column_is_zero_and_not_missing() -> None:
    rows = np.column_stack([np.arange(20.0), np.full(20, 3.0)])
    data = split_table("t", rows, np.arange(20), features="ab", queries=2)
    assert data.train.batch(slice(None))[0][:, 1].tolist() == [0.0] * 18


def test_more_queries_than_test_rows_are_refused() -> None:
    with pytest.raises(DataError, match="58 queries were asked for: breast_cancer has 57"):
        breast_cancer.load(queries=58)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tanh'"):
        network((2, 3, 1), "tan")  # type: ignore[arg-type]


def test_small_networks_learn_their_tables() -> None:
    data = breast_cancer.load()
    model = breast_cancer.recipe(epochs=20).train(data.train)
    inputs, labels = data.test.batch(slice(None))
    with torch.no_grad():
        assert float((model(inputs).argmax(1) == labels).double().mean()) > 0.9


def test_windows_of_text_do_not_overlap_and_can_be_read() -> None:
    from pydoc_data.topics import topics

    data = text.load(train=50, queries=10, length=40)
    assert data.train.batch(slice(None))["input_ids"].shape == (50, 40)
    assert len(data.test) == 10
    every = data.texts(data.train) + data.texts(data.test)
    whole = "\n".join(" ".join(topics[name].lower().split()) for name in sorted(topics))
    plain = [window for window in every if "~" not in window]
    assert len(plain) > 40
    assert all(window in whole for window in plain)
    with pytest.raises(DataError, match="windows of 40 characters were asked for"):
        text.load(train=10**6, length=40)


def test_the_character_model_sees_only_what_came_before() -> None:
    model = text.build()
    ids = torch.randint(0, len(text.ALPHABET), (2, 20), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % len(text.ALPHABET)
    before, after = model(input_ids=ids), model(input_ids=changed)
    moved = (before - after).abs().amax((0, 2)) > 0
    assert moved.tolist() == [12 <= place < 12 + text.CONTEXT for place in range(20)]


def test_the_character_model_learns_more_than_frequencies() -> None:
    data = text.load(train=300, queries=30)
    recipe = text.recipe(epochs=30)
    model = recipe.train(data.train)
    everything = data.train.batch(slice(None))["input_ids"]
    shares = torch.bincount(everything.flatten(), minlength=len(text.ALPHABET)) + 1.0
    rest = data.test.batch(slice(None))
    frequencies = -(shares / shares.sum()).log()[rest["input_ids"][:, 1:]].mean()
    with torch.no_grad():
        assert float(recipe.loss(model, rest).mean()) < float(frequencies) - 0.2
