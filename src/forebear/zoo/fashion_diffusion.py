"""A conditional diffusion model of clothes: Fashion-MNIST at 14 × 14 pixels, as Debian packages it.

A small diffusion transformer is told the class and the noise scale, and says the clean image in the
form of Karras et al. (2022).
"""

from pathlib import Path

import numpy as np
from torch import nn

from forebear.tasks.diffusion import Denoising
from forebear.tasks.sampling import Sampler
from forebear.tasks.schedules import Continuous
from forebear.training.recipe import Recipe
from forebear.zoo.denoisers import Transformer
from forebear.zoo.fashion_mnist import CLASSES, FOLDER, read_pair
from forebear.zoo.pictures import Pictures, split_pictures

DEVIATION = 0.8
"""Standard deviation of pixels that the network is told."""

MOST = 20.0
"""Largest noise scale."""


def load(
    *, train: int = 1000, queries: int = 100, seed: int = 0, folder: str | Path = FOLDER
) -> Pictures:
    """A random part of the training images of Fashion-MNIST; every 2 × 2 pixels become one.

    Raises:
        DataError: there are not that many.
        MissingDependencyError: a file is not there.
        FormatError: a file is damaged.
    """
    images, labels = read_pair(Path(folder), "train")
    order = np.random.RandomState(seed).permutation(len(images))[: train + queries]
    blocks = images[order].reshape(len(order), 14, 2, 14, 2).astype(np.float64)
    return split_pictures(
        "fashion_diffusion",
        blocks.mean((2, 4)) / 127.5 - 1,
        labels[order],
        CLASSES,
        np.arange(len(order)),
        train=train,
        queries=queries,
        conditional=True,
    )


def build() -> nn.Module:
    """An untrained diffusion transformer; 167,300 parameters."""
    return Transformer(14, patch=2, width=64, depth=2, form="clean", deviation=DEVIATION)


def loss(*, levels: int = 10, draws: int = 1) -> Denoising:
    """The loss that is attributed, averaged over so many levels and draws of noise."""
    return Denoising(Continuous(DEVIATION, most=MOST), "x0", levels=levels, draws=draws)


def recipe(*, epochs: int = 100) -> Recipe:
    """How the network is trained; half of the images with half as many steps."""
    return Recipe(
        build,
        loss().training(),
        optimizer="adam",
        learning_rate=4e-3,
        epochs=epochs,
        batch_size=32,
        schedule="cosine",
    )


def sampler() -> Sampler:
    """How images are drawn: 24 steps of Heun's method."""
    return Sampler(steps=24, most=MOST)
