"""Diffusion models of handwritten digits of 8 × 8 pixels, which come with scikit-learn.

Two small networks: `"epsilon"` says the noise at the 1,000 timesteps of DDPM, `"x0"` the clean
image at the noise scales of EDM.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from torch import nn

from forebear.errors import MissingDependencyError, unknown_name
from forebear.tasks.diffusion import Denoising
from forebear.tasks.sampling import Sampler
from forebear.tasks.schedules import Continuous
from forebear.training.recipe import Recipe
from forebear.zoo.denoisers import Denoiser
from forebear.zoo.pictures import Pictures, split_pictures

Kind = Literal["epsilon", "x0"]

CLASSES = tuple(str(digit) for digit in range(10))

DEVIATION = 0.75
"""Standard deviation of the pixels."""

MOST = 20.0
"""Largest noise scale that the EDM network is asked about."""


def load(*, train: int = 1000, queries: int = 200, seed: int = 0) -> Pictures:
    """The digits in a random order that numpy has always drawn: `train`, then `queries`.

    Raises:
        DataError: there are not that many.
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "the digits come with scikit-learn: pip install scikit-learn"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    scaled = np.asarray(pixels).reshape(-1, 8, 8) / 8 - 1
    order = np.random.RandomState(seed).permutation(len(scaled))
    return split_pictures(
        "digits_diffusion", scaled, np.asarray(labels), CLASSES, order, train=train, queries=queries
    )


def build() -> nn.Module:
    """An untrained network that says the noise; 181,312 parameters."""
    return Denoiser((1, 8, 8), 256)


def build_clean() -> nn.Module:
    """An untrained network that says the clean image; 82,624 parameters."""
    return Denoiser((1, 8, 8), 160, form="clean", deviation=DEVIATION)


BUILDERS: dict[str, Callable[[], nn.Module]] = {"epsilon": build, "x0": build_clean}


def loss(kind: Kind = "epsilon", *, levels: int = 10, draws: int = 1) -> Denoising:
    """The loss that is attributed, averaged over so many levels and draws of noise."""
    _require(kind)
    if kind == "epsilon":
        return Denoising(levels=levels, draws=draws)
    return Denoising(Continuous(DEVIATION, most=MOST), "x0", levels=levels, draws=draws)


def recipe(kind: Kind = "epsilon", *, epochs: int | None = None) -> Recipe:
    """How a network is trained; half of the images with half as many steps."""
    _require(kind)
    return Recipe(
        BUILDERS[kind],
        loss(kind).training(),
        optimizer="adam",
        learning_rate=1e-3,
        epochs=epochs or {"epsilon": 400, "x0": 375}[kind],
        batch_size=128,
        schedule="cosine",
    )


def sampler(kind: Kind = "epsilon") -> Sampler:
    """How images are drawn: 50 steps of DDIM within the range of pixels, or 24 of Heun's method."""
    _require(kind)
    return Sampler(steps=50, clip=True) if kind == "epsilon" else Sampler(steps=24, most=MOST)


def _require(kind: str) -> None:
    if kind not in BUILDERS:
        raise unknown_name("network for digits", kind, BUILDERS)
