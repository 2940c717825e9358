"""Pictures of two concepts, for the question which training images taught a model one of them.

Each picture of 10 × 10 pixels has a shape (ring, plus or cross) somewhere on the left and a bright
bar at the top, in the middle or at the bottom of the right edge. No training picture shows both a
ring and a bar at the top, so a ranking by whole images cannot find teachers of both at once.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from forebear.curvature import Dense, NonzeroRelative, Whole
from forebear.data import Data
from forebear.errors import DataError
from forebear.methods.concept_trak import ConceptTRAK, concepts
from forebear.methods.influence import Influence
from forebear.metrics import precision_at
from forebear.projections import SJLT
from forebear.task import Task
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

PATTERNS = np.array(
    [
        [".###.", "#...#", "#...#", "#...#", ".###."],
        ["..#..", "..#..", "#####", "..#..", "..#.."],
        ["#...#", ".#.#.", "..#..", ".#.#.", "#...#"],
    ]
)
LEVELS = tuple(range(100, 1000, 100))

KERNEL = Whole(Dense(kind="fisher"))


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
    seen = [pair for pair in product(range(3), range(3)) if pair != WITHHELD]
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


def draw(labels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Pictures `[n, 10, 10]` of shapes and bars `[n, 2]`, from -1 to 1 and a little beyond."""
    pixels = np.full((len(labels), SIDE, SIDE), -1.0)
    for picture, (shape, bar) in zip(pixels, labels, strict=True):
        down, across = random.randint(SIDE - 4), random.randint(3)
        bright = np.array([[mark == "#" for mark in row] for row in PATTERNS[shape]])
        picture[down : down + 5, across : across + 5][bright] = 1.0
        top = (SIDE - 3) * bar // 2
        picture[top : top + 3, 8:] = 1.0
    return pixels + NOISE * random.standard_normal(pixels.shape)


def condition(labels: Tensor) -> Tensor:
    """What the network is told of shapes and bars `[n, 2]`: `[n, 6]`."""
    return torch.nn.functional.one_hot(labels, 3).flatten(1).float()


def without(labels: Tensor, concept: int) -> Tensor:
    """Conditions `[n, 6]` that say nothing of the shape (0) or of the bar (1)."""
    told = condition(labels).view(-1, 2, 3)
    told[:, concept] = 0.0
    return told.flatten(1)


def asked(data: Concepts, concept: int) -> dict[str, Tensor]:
    """Queries about the shape (0) or the bar (1) of each query picture."""
    batch = data.queries.batch(slice(None))
    return concepts(batch["condition"], without(data.query_labels, concept), keys=batch["key"])


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


TRAININGS: dict[str, dict[str, Any]] = {
    "posterior, inverted": {"inversion": True},
    "posterior": {},
    "posterior, inverted, unit": {"inversion": True, "normalise": True},
    "posterior, unit": {"normalise": True},
    "loss": {"training": "loss"},
    "square_norm": {"training": "square_norm"},
    "absolute": {"training": "absolute"},
}
"""Options of `ConceptTRAK` that `compare` compares."""


def compare(*, seed: int = 0, draws: int = 90, epochs: int = 750) -> dict[str, tuple[float, float]]:
    """Precision at 10 of teachers of a concept, averaged over both concepts.

    Rankings by whole images have one order for both, those by concepts one for each.

    Args:
        seed: of the network.
        draws: noisy images of a concept.
        epochs: of training.

    Returns:
        For each ranking the precision for pairs that training shows, and for the withheld one.
    """
    data = load(pairs=8)
    task = Task(recipe(epochs=epochs).train(data.train, seed=seed), loss())
    shown = [batch["image"].flatten(1) for batch in map(_all, (data.queries, data.train))]
    whole = Influence(curvature=KERNEL, projection=SJLT(), damping=NonzeroRelative(10.0))
    by_image = whole.fit(task, data.train).score(data.queries).values
    found = {
        "whole image, pixels": _both(data, [-torch.cdist(*shown)] * 2),
        "whole image, loss": _both(data, [by_image] * 2),
    }
    for name, options in TRAININGS.items():
        fitted = ConceptTRAK(draws=draws, **options).fit(task, data.train)
        each = [fitted.score(asked(data, concept)).values for concept in (0, 1)]
        found[f"concept, {name}"] = _both(data, each)
    return found


def precision(data: Concepts, scores: Tensor, concept: int, k: int = 10) -> Tensor:
    """Share of the `k` highest scores `[q, n]` whose picture has the query's concept, `[q]`."""
    right = data.labels[None, :, concept] == data.query_labels[:, concept, None]
    return torch.from_numpy(precision_at(scores.numpy(), right.numpy(), k))


def _both(data: Concepts, scores: list[Tensor]) -> tuple[float, float]:
    each = torch.stack([precision(data, scores[concept], concept) for concept in (0, 1)]).mean(0)
    return each[~data.withheld].mean().item(), each[data.withheld].mean().item()


def _all(data: Data) -> Any:
    return data.batch(slice(None))
