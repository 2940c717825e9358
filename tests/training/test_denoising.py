"""Training denoising networks: stacked and alone alike, with noise that belongs to visits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.errors import TaskError
from forebear.tasks.diffusion import Denoising, images
from forebear.tasks.noise import moments
from forebear.tasks.schedules import Continuous, Schedule


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(7, 16), nn.SiLU(), nn.Linear(16, 6))

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        return self.net(torch.cat([noisy, level.to(noisy)[:, None] / 1000], 1))


def recipe(schedule: Schedule | None = None, prediction: Any = "epsilon") -> fb.Recipe:
    loss = Denoising(schedule, prediction, levels=5).training()
    return fb.Recipe(Denoiser, loss, learning_rate=3e-3, epochs=6, batch_size=16, optimizer="adam")


@pytest.fixture
def train() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return images(torch.rand(60, 6, generator=generator) * 2 - 1)


@pytest.mark.parametrize("edm", [False, True])
def test_stacked_and_alone_are_the_same(train: dict[str, Any], edm: bool) -> None:
    own = recipe(Continuous(0.6), "x0") if edm else recipe()
    masks = torch.rand(3, 60, generator=torch.Generator().manual_seed(1)) < 0.5
    many = own.train_many(train, masks, [0, 1, 1])
    for member, (mask, seed) in enumerate(zip(masks, (0, 1, 1), strict=True)):
        alone = own.train(train, mask, seed)
        for mine, theirs in zip(many.model(member).parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)


def test_training_lowers_the_loss(train: dict[str, Any]) -> None:
    loss = Denoising(levels=10)
    own = recipe().with_settings(epochs=60)
    before = loss(own.with_settings(learning_rate=1e-12).train(train), train).mean()
    assert loss(own.train(train), train).mean() < 0.8 * before


def test_visits_differ_and_levels_cover_the_schedule(train: dict[str, Any]) -> None:
    loss = recipe().loss
    model = Denoiser()
    keys = torch.arange(60)
    values = [loss(model, {**train, "moment": moments(keys, 0, epoch)}) for epoch in (0, 1)]
    assert not torch.allclose(*values)
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
            seen.append(level)
            return noisy

    for epoch in range(100):
        loss(Watching(), {**train, "moment": moments(keys, 3, epoch)})
    levels = torch.cat(seen)
    assert levels.min() >= 0
    assert levels.max() <= 999
    counts = torch.histc(levels.double(), 10, 0, 999)
    assert (counts / counts.sum() - 0.1).abs().max() < 0.015


def test_a_batch_without_its_moment_is_refused(train: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="no 'moment'"):
        recipe().loss(Denoiser(), train)
    with pytest.raises(TaskError, match="they have no 'key'"):
        recipe().train((train["image"], train["key"]))
