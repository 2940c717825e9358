"""A small diffusion model whose images are asked about."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import forebear as fb
from forebear.data import Data
from forebear.tasks.diffusion import Denoising, images
from forebear.tasks.sampling import Guided, Sampler
from forebear.tasks.schedules import Continuous
from forebear.training.recipe import Recipe
from forebear.zoo.denoisers import Denoiser

SIDE, TRAIN, MADE = 8, 30, 3


def build() -> nn.Module:
    return Denoiser((1, SIDE, SIDE), 24, form="clean")


class Small(NamedTuple):
    """A trained model, its images, and images that it made."""

    task: fb.Task
    train: Data
    generated: Data
    recipe: Recipe
    sampler: Sampler

    def remove(self, **settings: Any) -> fb.Counterfactual:
        own = {"recipe": self.recipe, "sampler": self.sampler, "count": 5}
        return fb.Counterfactual(**{**own, **settings})


def blobs(count: int, seed: int, channels: int = 1, side: int = SIDE) -> Tensor:
    """Bright squares on black, from -1 to 1, each with a little noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.full((count, channels, side, side), -0.9)
    for picture in pixels:
        down, across = torch.randint(1, side - 4, (2,), generator=generator).tolist()
        picture[:, down : down + 3, across : across + 3] = 0.9
    return pixels + 0.05 * torch.randn(pixels.shape, generator=generator)


def trained() -> Small:
    """Trained in a second or two."""
    train = Data(images(blobs(TRAIN, 0)), ids=[f"blob-{i:02d}.png" for i in range(TRAIN)])
    loss = Denoising(Continuous(0.7, most=20.0), "x0", levels=3)
    recipe = Recipe(
        build, loss.training(), optimizer="adam", learning_rate=5e-3, epochs=100, batch_size=15
    )
    model = recipe.train(train, seed=0)
    sampler = Sampler(steps=6, most=20.0, clip=True)
    keys = 1000 + torch.arange(MADE)
    made = sampler.sample(Guided(model, loss), sampler.start(loss, keys, (1, SIDE, SIDE)))
    return Small(fb.Task(model, loss), train, Data(images(made, keys=keys)), recipe, sampler)
