"""Which handwritten digits are behind the digits that a small diffusion model makes.

    forebear attribute examples/generated_digit.py -m das -m nda -m similarity --out runs/digit

Trains the model, makes eight digits, looks for the training images behind each, and trains again
without those: about two minutes. The page is runs/digit/report.html. Needs scikit-learn, which the
digits come with.
"""

from functools import cache

import torch
from torch import nn

import forebear as fb
from forebear.tasks.diffusion import images
from forebear.tasks.sampling import Guided
from forebear.zoo import digits_diffusion as zoo

PICTURES = zoo.load()
RECIPE = zoo.recipe("x0")
LOSS = zoo.loss("x0")
SAMPLER = zoo.sampler("x0")
KEYS = 20_000 + torch.arange(8)  # start noise of each generated image belongs to its key


@cache
def model() -> nn.Module:
    return RECIPE.train(PICTURES.train, seed=0)


def task() -> fb.Task:
    return fb.Task(model(), LOSS)


def train() -> fb.Data:
    """1,000 images of 8 × 8 pixels."""
    return PICTURES.train


def queries() -> dict[str, torch.Tensor]:
    """What is asked about: images that the model made, with their keys."""
    start = SAMPLER.start(LOSS, KEYS, PICTURES.shape)
    return images(SAMPLER.sample(Guided(model(), LOSS), start), keys=KEYS)


def counterfactual() -> fb.Counterfactual:
    """What the same start noise becomes when each image's first 50 training images are missing."""
    return fb.Counterfactual(RECIPE, SAMPLER, count=50)


def examples() -> dict[str, dict[int, str]]:
    """Words for people, by id."""
    return {"train": {i: f"a {label}" for i, label in enumerate(PICTURES.labels.tolist())}}
