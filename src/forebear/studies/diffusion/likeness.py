"""Baselines that need no diffusion model: how alike images are.

All scores are `[query, train]`, higher for what is more alike.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from forebear.methods.pixels import cosines, distances
from forebear.tasks import losses
from forebear.tasks.noise import gaussian
from forebear.tasks.schedules import Schedule
from forebear.training.recipe import Recipe
from forebear.training.subsets import subset_masks
from forebear.zoo.pictures import Pictures


def pixel_closeness(queries: Tensor, train: Tensor) -> Tensor:
    """Minus the Euclidean distance of the pixels."""
    return distances(queries.flatten(1), train.flatten(1))


def cosine(queries: Tensor, train: Tensor) -> Tensor:
    """Cosine of rows, `[..., d]` flattened."""
    return cosines(queries.flatten(1), train.flatten(1))


def whole_image_softmax(
    queries: Tensor, train: Tensor, keys: Tensor, schedule: Schedule, level: float, seed: int = 0
) -> Tensor:
    """Weights of the training images in the optimal denoiser of the noisy query."""
    signal, noise = schedule.at(level)
    drawn = gaussian(keys, tuple(queries.shape[1:]), seed, level, dtype=torch.float64)
    noisy = signal * queries.double() + noise * drawn
    squares = torch.cdist(noisy.flatten(1), signal * train.flatten(1).double()).square()
    return (-squares / (2 * noise**2)).softmax(1)


def datamodel(subsets: Tensor, outcomes: Tensor, ridge: float = 1.0) -> Tensor:
    """Coefficients of a ridge regression of outcomes on membership, `[q, n]`; Ilyas et al. (2022).

    Judged on the subsets it was fitted to it is an oracle, beyond any method that sees none.

    Args:
        subsets: bool `[m, n]`.
        outcomes: `[m, q]`.
        ridge: a multiple of the mean eigenvalue of the kernel of the subsets.
    """
    rows = subset_masks(subsets, subsets.shape[1]).double()
    rows = rows - rows.mean(0)
    kernel = rows @ rows.T
    damped = kernel + ridge * kernel.diagonal().mean() * torch.eye(len(rows), dtype=torch.float64)
    wanted = outcomes.double() - outcomes.double().mean(0)
    return (rows.T @ torch.linalg.solve(damped, wanted)).T


def classifier(shape: tuple[int, ...], classes: int) -> nn.Module:
    """An untrained classifier whose hidden layer of 64 is the embedding."""
    pixels = int(np.prod(shape))
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


@dataclass(frozen=True)
class Build:
    """Makes the classifier; a class because recipes name what builds."""

    shape: tuple[int, ...]
    classes: int
    name: str = "classifier"

    def __call__(self) -> nn.Module:
        """A new one."""
        return classifier(self.shape, self.classes)


def encoder(pictures: Pictures, *, epochs: int = 60, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Hidden states `[b, 64]` of a classifier trained on the labels of the training images."""
    recipe = Recipe(
        Build(pictures.shape, len(pictures.classes)),
        losses.cross_entropy,
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=1e-3,
        epochs=epochs,
        batch_size=64,
        schedule="cosine",
    )
    image = pictures.train.batch(slice(None))["image"]
    trained = recipe.train((image, pictures.labels), seed=seed)
    assert isinstance(trained, nn.Sequential)
    body = trained[:-1]

    @torch.no_grad()
    def embed(pixels: Tensor) -> Tensor:
        return body(pixels)

    return embed
