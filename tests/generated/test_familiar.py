"""Whether the model knows what it made: against Monte Carlo, and on models that learned nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generated_cases import Small, blobs
from torch import Tensor, nn

import forebear as fb
from forebear.data import Data
from forebear.gallery import Familiar, Gallery
from forebear.generated.familiar import familiar
from forebear.report import image_words
from forebear.tasks.diffusion import Denoising, images
from forebear.tasks.schedules import Continuous, Discrete
from forebear.zoo.denoisers import Denoiser


class Linear(nn.Module):
    """The best linear estimate from the mean and one variance, as any of the three predictions."""

    def __init__(self, loss: Denoising, pixels: Tensor) -> None:
        super().__init__()
        self.loss = loss
        self.mean = nn.Parameter(pixels.mean(0))
        self.spread = float((pixels - pixels.mean(0)).square().mean())

    def forward(self, noisy: Tensor, levels: Tensor) -> Tensor:
        a, b = self.loss.schedule.at(float(levels[0]))
        gain = a * self.spread / (a * a * self.spread + b * b)
        clean = self.mean + gain * (noisy - a * self.mean)
        noise = (noisy - a * clean) / b
        return {"x0": clean, "epsilon": noise, "v": a * noise - b * clean}[self.loss.prediction]


@pytest.mark.parametrize(
    "loss",
    [
        Denoising(Discrete.linear(), "epsilon", levels=(200,)),
        Denoising(Discrete.linear(), "v", levels=(200,)),
        Denoising(Discrete.linear(), "x0", levels=(200,)),
        Denoising(Continuous(0.7), "x0", levels=(0.8,)),
    ],
    ids=["epsilon", "v", "x0", "edm"],
)
def test_a_model_that_knows_the_mean_alone_has_the_whole_loss_of_that(loss: Denoising) -> None:
    pixels = blobs(256, 0).double()
    task = fb.Task(Linear(loss, pixels), loss)
    found = familiar(task, Data(images(pixels)), Data(images(blobs(2, 9).double())), None)
    assert found.share == pytest.approx(1.0, abs=0.03)  # 16,384 draws of noise


def test_training_brings_a_model_from_knowing_nothing_to_knowing_its_images() -> None:
    train = Data(images(blobs(30, 0)))
    loss = Denoising(Continuous(0.7), "x0", levels=(0.3, 0.8))
    recipe = fb.Recipe(
        lambda: Denoiser((1, 8, 8), 96, form="clean"),
        loss.training(),
        optimizer="adam",
        learning_rate=5e-3,
        epochs=1,
        batch_size=15,
    )
    shares = []
    for epochs in (1, 300):
        model = replace(recipe, epochs=epochs).train(train, seed=0)
        found = familiar(fb.Task(model, loss), train, train, None)
        assert found.share is not None
        shares.append(found.share)
    assert shares[0] > image_words.NOTHING
    assert shares[1] < 0.7


def test_noise_is_strange_to_the_model_and_its_training_images_are_not(small: Small) -> None:
    noise = torch.rand((2, *blobs(1, 0).shape[1:]), generator=torch.Generator().manual_seed(0))
    mixed = torch.cat([2 * noise - 1, small.train.batch(slice(0, 2))["image"]])
    keys = torch.tensor([50, 51, 0, 1])
    known = familiar(small.task, small.train, Data(images(mixed, keys=keys)), None)
    gallery = Gallery(asked=[], train=[], side=[8, 8], familiar=known)
    assert [image_words.strange(gallery, i) for i in range(4)] == [True, True, False, False]
    assert known.among == len(small.train)


def test_the_number_of_images_at_a_time_changes_nothing(small: Small) -> None:
    whole = familiar(small.task, small.train, small.generated, None)
    parts = familiar(small.task, small.train, small.generated, 2)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert parts.share == pytest.approx(whole.share, rel=1e-5)


def test_one_training_image_leaves_nothing_to_compare_with(small: Small) -> None:
    one = Data(images(blobs(1, 0)))
    assert familiar(small.task, one, small.generated, None).share is None


def test_what_was_found_is_kept_with_the_gallery(tmp_path: Path) -> None:
    known = Familiar(losses=[1.0], median=0.5, largest=0.7, among=3)
    Gallery(asked=[], train=[], side=[], familiar=known).save(tmp_path)
    assert Gallery.load(tmp_path).familiar == known
