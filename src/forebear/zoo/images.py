"""Labelled images split into training, test and query sets, and label errors planted in them."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from forebear.data import Data
from forebear.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Images:
    """A classification task on small grey images.

    Inputs are flat float32, standardised with the mean and spread of the training pixels; labels
    are int64. Queries are the first test examples.

    Attributes:
        train: `(x [n, p], y [n])`.
        queries: `(x [q, p], y [q])`.
        test: `(x, y)`, of which the queries are the beginning.
        train_images: uint8 `[n, h, w]`, for thumbnails.
        query_images: uint8 `[q, h, w]`.
        classes: name of each class.
        flipped: bool `[n]`, whether the label was changed on purpose.
    """

    name: str
    train: Data
    queries: Data
    test: Data
    train_images: np.ndarray
    query_images: np.ndarray
    classes: tuple[str, ...]
    flipped: Tensor = field(repr=False)

    def with_flipped_labels(self, fraction: float = 0.05, seed: int = 0) -> "Images":
        """The same with some training labels changed, and `flipped` to say which."""
        inputs, labels = self.train.batch(slice(None))
        wrong, flipped = flip_labels(labels, fraction, seed, classes=len(self.classes))
        return replace(self, train=Data((inputs, wrong)), flipped=flipped)

    def accuracy(self, model: nn.Module) -> float:
        """Share of the test set that the model classifies correctly."""
        inputs, labels = self.test.batch(slice(None))
        with torch.no_grad():
            return float((model(inputs).argmax(1) == labels).float().mean())


def flip_labels(
    labels: Tensor, fraction: float = 0.05, seed: int = 0, *, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Change some labels to another class, each other class being as likely.

    Args:
        labels: int64 `[n]`.
        fraction: share of the labels to change, rounded to the nearest number.
        seed: of the choice.
        classes: how many classes there are; one more than the largest label when left out.

    Returns:
        The labels `[n]` and a bool mask `[n]` of those changed.

    Raises:
        DataError: the fraction is not between 0 and 1, or there is no other class.
    """
    classes = int(labels.max()) + 1 if classes is None else classes
    if not 0 <= fraction <= 1:
        raise DataError(f"fraction is {fraction}: it must be between 0 and 1")
    if classes < 2:
        raise DataError("labels of one class cannot be flipped")
    generator = torch.Generator().manual_seed(seed)
    count = round(fraction * len(labels))
    rows = torch.randperm(len(labels), generator=generator)[:count]
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[rows] = True
    shifts = torch.randint(1, classes, (count,), generator=generator)
    wrong = labels.clone()
    wrong[rows] = (labels[rows] + shifts) % classes
    return wrong, flipped


def split_images(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    *,
    train: int,
    queries: int,
    seed: int | None,
    test_images: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
) -> Images:
    """Split images into training, test and queries, and standardise them.

    Args:
        name: of the task.
        images: uint8 `[n, h, w]`.
        labels: `[n]`.
        classes: name of each class.
        train: size of the training set.
        queries: number of test examples to ask about.
        seed: of the random split.
        test_images: a test set of its own; otherwise it is what training leaves over.
        test_labels: its labels.

    Raises:
        DataError: there are not that many images.
    """
    order = np.random.default_rng(seed).permutation(len(images))
    if test_images is None or test_labels is None:
        test_images, test_labels = images[order[train:]], labels[order[train:]]
    if not 0 < train <= len(images) or not 0 < queries <= len(test_images):
        raise DataError(
            f"{train} training images and {queries} queries were asked for: {name} has "
            f"{len(images)} images, of which {len(test_images)} are left for testing"
        )
    images, labels = images[order[:train]], labels[order[:train]]
    mean, spread = float(images.mean()), float(images.std())

    def tensors(pixels: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
        flat = torch.from_numpy(pixels.reshape(len(pixels), -1).astype(np.float32))
        return (flat - mean) / spread, torch.from_numpy(y.astype(np.int64))

    return Images(
        name=name,
        train=Data(tensors(images, labels)),
        queries=Data(tensors(test_images[:queries], test_labels[:queries])),
        test=Data(tensors(test_images, test_labels)),
        train_images=images,
        query_images=test_images[:queries],
        classes=classes,
        flipped=torch.zeros(train, dtype=torch.bool),
    )
