"""Does a step on a training image bring what a diffusion model sees nearer to it?"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from forebear.methods.concept_trak.steering import Following, Posterior
from forebear.tasks.diffusion import Denoising
from forebear.zoo.concepts import Concepts

LEVELS = (150, 300, 450, 600, 750)
"""Timesteps at which steps are tried."""


def steps_bring_nearer(
    model: nn.Module, loss: Denoising, data: Concepts, *, count: int = 20, length: float = 1e-2
) -> float:
    """Share of training images and timesteps at which a step on the image works as it should.

    A step of that length down the loss of following the image's reward should bring the clean
    image that the model sees nearer to it. The model is as it was afterwards, up to rounding.

    Args:
        model: a trained network.
        loss: how it is called.
        data: training images; the first `count` are tried.
        count: number of images.
        length: of the step in all parameters.
    """
    batch = data.train.batch(slice(0, count))
    parameters = list(model.parameters())
    good = 0
    for level in LEVELS:
        rows = Posterior(loss.at((level,))).rows(model, batch)
        for i in range(count):
            flat, image = {name: x[i] for name, x in rows.items()}, batch["image"][i]
            slopes = torch.autograd.grad(Following(loss)(model, flat).mean(), parameters)
            step = length / torch.cat([slope.flatten() for slope in slopes]).norm().item()
            before = _distance(model, loss, flat, level, image)
            _move(parameters, slopes, -step)
            good += _distance(model, loss, flat, level, image) < before
            _move(parameters, slopes, step)
    return good / (count * len(LEVELS))


@torch.no_grad()
def _distance(
    model: nn.Module, loss: Denoising, flat: dict[str, Tensor], level: float, image: Tensor
) -> float:
    said = loss.predicted(model, flat["noisy"], level, flat)
    return (loss.clean(flat["noisy"], said, level) - image).norm().item()


@torch.no_grad()
def _move(parameters: Sequence[Tensor], slopes: Sequence[Tensor], by: float) -> None:
    for parameter, slope in zip(parameters, slopes, strict=True):
        parameter += by * slope
