"""Handwritten digits of 8 × 8 pixels, which come with scikit-learn."""

import numpy as np
from torch import nn

from forebear.errors import MissingDependencyError
from forebear.tasks import losses
from forebear.training.recipe import Recipe
from forebear.zoo.images import Images, split_images

CLASSES = tuple(str(digit) for digit in range(10))


def load(*, train: int = 1297, queries: int = 100, seed: int = 0) -> Images:
    """The 1,797 digits: `train` of them for training, the rest for testing.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "the digits come with scikit-learn: pip install scikit-learn"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    # Pixels count from 0 to 16.
    images = np.minimum(np.asarray(pixels) * 16, 255).astype(np.uint8).reshape(-1, 8, 8)
    return split_images(
        "digits", images, np.asarray(labels), CLASSES, train=train, queries=queries, seed=seed
    )


def build() -> nn.Module:
    """An untrained network 64-64-32-10."""
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def recipe(*, epochs: int = 40) -> Recipe:
    """How the network is trained."""
    return Recipe(
        build,
        losses.cross_entropy,
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=1e-2,
        epochs=epochs,
        batch_size=64,
        schedule="cosine",
    )
