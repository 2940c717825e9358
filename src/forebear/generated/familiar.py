"""Whether the model knows the images that it made, and knows anything at all."""

import torch
from torch import Tensor

from forebear.data import Data, map_tensors
from forebear.gallery import Familiar
from forebear.task import Task
from forebear.tasks.diffusion import Denoising

SAMPLE = 256
"""Training images to compare with, evenly spread."""

AT_ONCE = 64


def familiar(task: Task, train: Data, generated: Data, batch_size: int | None) -> Familiar:
    """Losses of generated images beside those of training images, and of knowing nothing.

    A network that knows nothing but the mean training image m and the variance s of pixels around
    it answers best with the linear estimate `m + c (x_t − a m)`, `c = a s / (a² s + b²)`, at signal
    a and noise b. Its squared error of the clean image is `s b² / (a² s + b²)`. Of the levels of
    the loss, that is compared at which the network is furthest below it: at very little or very
    much noise there is nothing to gain for anyone.

    Args:
        task: a diffusion task.
        train: the training images.
        generated: those to judge.
        batch_size: images at a time, if fewer than 64: there are no gradients to gain from more.
    """
    loss = task.loss
    assert isinstance(loss, Denoising)
    rows = torch.linspace(0, len(train) - 1, min(SAMPLE, len(train))).round().long()
    size = min(batch_size or AT_ONCE, AT_ONCE)
    learned, pixels = _errors(task, train.select(rows), size)
    made, _ = _errors(task, generated, size)
    known = learned.mean(1)
    spread = float((pixels - pixels.mean(0)).square().mean())
    nothing = torch.tensor([_of_nothing(loss, point.level, spread) for point in loss.points])
    able = nothing > 0
    shares = learned.mean(0)[able] / nothing[able]
    return Familiar(
        losses=made.mean(1).tolist(),
        median=float(known.median()),
        largest=float(known.max()),
        among=len(known),
        share=float(shares.min()) if len(shares) else None,
    )


def _errors(task: Task, data: Data, size: int) -> tuple[Tensor, Tensor]:
    """Weighted errors `[n, points]` and pixels `[n, d]`, in double precision."""
    loss = task.loss
    assert isinstance(loss, Denoising)
    errors, pixels = [], []
    with torch.no_grad(), task.evaluation():
        for _, batch in data.batches(size):
            here = map_tensors(lambda tensor: tensor.to(task.device), batch)
            errors.append(loss.errors(loss.outputs(task.model, here), here).double().cpu())
            pixels.append(batch["image"].double().flatten(1).cpu())
    return torch.cat(errors), torch.cat(pixels)


def _of_nothing(loss: Denoising, level: float, spread: float) -> float:
    """Loss at a level of who knows the mean image and the variance around it."""
    signal, strength = loss.schedule.at(level)
    if not strength or not spread:
        return 0.0
    clean = spread * strength**2 / (signal**2 * spread + strength**2)
    factor = {"x0": 1.0, "epsilon": (signal / strength) ** 2, "v": strength**-2}
    return loss.schedule.weight(level) * clean * factor[loss.prediction]
