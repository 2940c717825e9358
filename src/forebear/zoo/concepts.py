"""Pictures of two concepts, for the question which training images taught a model one of them.

Each picture of 10 × 10 pixels has a shape (ring, plus or cross) somewhere on the left and a bright
bar at the top, in the middle or at the bottom of the right edge. No training picture shows both a
ring and a bar at the top, so a ranking by whole images cannot find teachers of both at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from forebear.data import Data
from forebear.errors import DataError
from forebear.methods.concept_trak import concepts
from forebear.metrics import precision_at
from forebear.tasks.diffusion import Denoising, images
from forebear.tasks.sampling import Sampler
from forebear.tasks.schedules import Discrete
from forebear.training.recipe import Recipe
from forebear.zoo.denoisers import Denoiser
from forebear.zoo.pictures import QUERY_KEYS

SHAPES = ("ring", "plus", "cross")
BARS = ("top", "middle", "bottom")
WITHHELD = (0, 0)
"""A ring with a bar at the top: no training picture has both."""

SIDE = 10
NOISE = 0.05
"""Standard deviation of what is added to every pixel."""

PATTERNS = {
    0: [".###.", "#...#", "#...#", "#...#", ".###."],
    1: ["..#..", "..#..", "#####", "..#..", "..#.."],
    2: ["#...#", ".#.#.", "..#..", ".#.#.", "#...#"],
}
"""Rows of each shape."""

LEVELS = tuple(range(100, 1000, 100))


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """Pictures and the two concepts that each of them shows.

    Attributes:
        train: dict dataset as of `forebear.tasks.diffusion.images`, with the concepts as conditions
            `[n, 6]`: three of the shape, then three of the bar, each with a single one.
        queries: pictures that were held out, some of them of the withheld pair.
        labels: int64 `[n, 2]`, shape and bar of each training picture.
        query_labels: int64 `[q, 2]`.
    """

    train: Data
    queries: Data
    labels: Tensor
    query_labels: Tensor

    @property
    def withheld(self) -> Tensor:
        """Which queries show the pair that no training picture does, bool `[q]`."""
        return (self.query_labels == torch.tensor(WITHHELD)).all(1)


def load(*, train: int = 1000, each: int = 6, pairs: int = 5, seed: int = 0) -> Concepts:
    """Training pictures of the eight pairs, and queries of the withheld one and of some others.

    Args:
        train: number of training pictures.
        each: queries of a pair.
        pairs: that queries show, besides the withheld one.
        seed: of places, pairs and pixel noise.

    Raises:
        DataError: there is nothing to draw, or there are fewer pairs.
    """
    seen = seen_pairs()
    if train < 1 or each < 1 or not 0 <= pairs <= len(seen):
        raise DataError(
            f"{train} training pictures and {each} queries of {pairs} pairs were asked for: there "
            f"must be at least one of each, and training shows {len(seen)} pairs"
        )
    random = np.random.RandomState(seed)
    labels = np.array(seen)[random.randint(len(seen), size=train)]
    # Every third of the pairs: no concept is left out.
    asked = np.repeat([WITHHELD, *(seen[3 * i % len(seen)] for i in range(pairs))], each, 0)
    parts = []
    for own, first in ((labels, 0), (asked, QUERY_KEYS)):
        pixels = torch.from_numpy(draw(own, random)).float()[:, None]
        keys = first + torch.arange(len(own))
        parts.append(Data(images(pixels, condition(torch.from_numpy(own)), keys=keys)))
    return Concepts(
        train=parts[0],
        queries=parts[1],
        labels=torch.from_numpy(labels),
        query_labels=torch.from_numpy(asked),
    )


def seen_pairs() -> list[tuple[int, int]]:
    """Shape and bar of each pair that training shows."""
    return [pair for pair in product(range(3), range(3)) if pair != WITHHELD]


def draw(
    labels: np.ndarray,
    random: np.random.RandomState,
    patterns: Mapping[int, Sequence[str]] = PATTERNS,
) -> np.ndarray:
    """Pictures `[n, 10, 10]` of shapes and bars `[n, 2]`, from -1 to 1 and a little beyond."""
    pixels = np.full((len(labels), SIDE, SIDE), -1.0)
    for picture, (shape, bar) in zip(pixels, labels, strict=True):
        down, across = random.randint(SIDE - 4), random.randint(3)
        bright = np.array([[mark == "#" for mark in row] for row in patterns[shape]])
        picture[down : down + 5, across : across + 5][bright] = 1.0
        top = (SIDE - 3) * bar // 2
        picture[top : top + 3, 8:] = 1.0
    return pixels + NOISE * random.standard_normal(pixels.shape)


def condition(labels: Tensor, shapes: int = len(SHAPES)) -> Tensor:
    """What a network that knows so many shapes is told of shapes and bars `[n, 2]`: `[n, 6]`."""
    told = zip(labels.T, (shapes, len(BARS)), strict=True)
    return torch.cat([torch.nn.functional.one_hot(label, n) for label, n in told], 1).float()


def without(labels: Tensor, concept: int) -> Tensor:
    """Conditions `[n, 6]` with equal parts of the other shapes (0) or bars (1) in place of its own.

    The network was never told less than one of each, so that a concept is better asked about
    against its like than against nothing.
    """
    said = condition(labels).view(-1, 2, 3)
    said[:, concept] = (1 - said[:, concept]) / 2
    return said.flatten(1)


def asked(labels: Tensor, concept: int, *, keys: Tensor | None = None) -> dict[str, Tensor]:
    """Queries about the shape (0) or the bar (1) of pairs `[q, 2]`.

    Args:
        labels: the pairs.
        concept: what is asked about.
        keys: of the noise that images were drawn from, for `scope="local"`.
    """
    return concepts(condition(labels), without(labels, concept), keys=keys)


def build() -> nn.Module:
    """An untrained network that is told both concepts; 110,276 parameters."""
    return Denoiser((1, SIDE, SIDE), 176, conditions=6, form="noise", schedule=Discrete.linear())


def loss() -> Denoising:
    """The loss that is attributed: nine levels, with the same noise for all pictures."""
    return Denoising(levels=LEVELS, noise="shared")


def recipe(*, epochs: int = 750) -> Recipe:
    """How the network is trained: with 1,000 pictures, 6,000 steps."""
    return Recipe(
        build,
        loss().training(),
        optimizer="adam",
        learning_rate=1e-3,
        epochs=epochs,
        batch_size=128,
        schedule="cosine",
    )


def sampler() -> Sampler:
    """How pictures are drawn: 50 steps of DDIM within the range of pixels."""
    return Sampler(steps=50, clip=True)


def precision(data: Concepts, scores: Tensor, concept: int, k: int = 10) -> np.ndarray:
    """Share of the `k` highest scores `[q, n]` whose picture has the query's concept, `[q]`."""
    right = data.labels[None, :, concept] == data.query_labels[:, concept, None]
    return precision_at(scores, right, k)
