"""Samplers, held against a Gaussian data set, whose optimal denoiser and paths are known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forebear.errors import TaskError
from forebear.tasks.diffusion import Denoising
from forebear.tasks.sampling import Guided, Sampler
from forebear.tasks.schedules import Continuous, Discrete

DEVIATION = 0.6


class Optimal(nn.Module):
    """The best denoiser of images from a Gaussian around `condition`, as a noise prediction."""

    def __init__(self, schedule: Any) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, noisy: Tensor, level: Tensor, condition: Any = None) -> Tensor:
        signal, noise = self.schedule.at(level[0].item())
        mean = torch.zeros(()) if condition is None else condition[:, None]
        variance = signal**2 * DEVIATION**2 + noise**2
        clean = mean + signal * DEVIATION**2 / variance * (noisy - signal * mean)
        if isinstance(self.schedule, Continuous):
            return clean
        return (noisy - signal * clean) / noise


def guided(schedule: Any, **settings: Any) -> Guided:
    prediction = "x0" if isinstance(schedule, Continuous) else "epsilon"
    loss = Denoising(schedule, prediction, levels=1)
    return Guided(Optimal(schedule), loss, **settings)


KEYS = torch.arange(400)


def test_ddim_follows_the_known_path() -> None:
    schedule = Discrete.linear()
    sampler, model = Sampler(steps=200), guided(schedule)
    start = sampler.start(model.loss, KEYS, (3,)).double()
    share = schedule.signal[-1]
    expected = start * DEVIATION / math.sqrt(share * DEVIATION**2 + 1 - share)
    torch.testing.assert_close(sampler.sample(model, start), expected, rtol=0.03, atol=0.01)


def test_heun_follows_the_known_path_and_is_of_second_order() -> None:
    model = guided(Continuous(DEVIATION))
    start = Sampler(most=20.0).start(model.loss, KEYS, (3,)).double()
    assert start.std().item() == pytest.approx(20, rel=0.05)
    expected = start * DEVIATION / math.sqrt(DEVIATION**2 + 400)
    errors = []
    for steps in (25, 50, 100):
        found = Sampler(steps=steps, most=20.0).sample(model, start)
        errors.append(((found - expected).norm() / expected.norm()).item())
    assert errors[0] < 0.03
    assert errors[0] / errors[1] == pytest.approx(4, abs=1)
    assert errors[1] / errors[2] == pytest.approx(4, abs=1)


@pytest.mark.parametrize("randomness", [0.5, 1.0])
def test_random_steps_keep_the_distribution(randomness: float) -> None:
    model, sampler = guided(Discrete.linear()), Sampler(steps=200, randomness=randomness)
    start = sampler.start(model.loss, torch.arange(4000), (2,))
    found = sampler.sample(model, start, torch.arange(4000))
    assert found.std().item() == pytest.approx(DEVIATION, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([found[:, 0], start[:, 0]]))[0, 1]) < 0.9
    assert torch.equal(found[:50], sampler.sample(model, start[:50], torch.arange(50)))


def test_inversion_leads_back() -> None:
    model, sampler = guided(Discrete.linear()), Sampler(steps=200)
    images = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double() * DEVIATION
    *_, (level, noise) = sampler.inversion(model, images)
    assert level == 999
    torch.testing.assert_close(sampler.sample(model, noise), images, rtol=0.05, atol=0.02)


def test_guidance_leads_away_from_the_other_condition() -> None:
    schedule = Discrete.linear()
    condition, without = torch.full((400,), 0.5), torch.zeros(400)
    sampler = Sampler(steps=100)
    means = []
    for guidance in (1.0, 2.0):
        model = guided(schedule, condition=condition, guidance=guidance, without=without)
        start = sampler.start(model.loss, KEYS, (3,))
        means.append(sampler.sample(model, start).mean().item())
    assert means[0] == pytest.approx(0.5, abs=0.05)
    assert means[1] == pytest.approx(1.0, abs=0.08)


def test_wrong_settings_are_named() -> None:
    model = guided(Discrete.linear())
    with pytest.raises(TaskError, match="compares two conditions"):
        guided(Discrete.linear(), guidance=3.0)
    with pytest.raises(TaskError, match="pass keys="):
        Sampler(randomness=1.0).sample(model, torch.zeros(2, 3))
    with pytest.raises(TaskError, match="2000 steps"):
        Sampler(steps=2000).sample(model, torch.zeros(2, 3))
    with pytest.raises(TaskError, match="Discrete schedule"):
        next(iter(Sampler().inversion(guided(Continuous()), torch.zeros(2, 3))))
