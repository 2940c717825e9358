"""Journey-TRAK: gradients along the way to a generated image."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import forebear as fb
from forebear.tasks.diffusion import Point, images
from forebear.tasks.sampling import Guided, Sampler
from forebear.tasks.schedules import Continuous
from forebear.zoo.denoisers import Denoiser
from tests.denoising_cases import SCALARS, case, features, kernel

SAMPLER = Sampler(steps=5, clip=True)
KEYS = torch.tensor([70, 81, 92])


def generated(task: fb.Task, sampler: Sampler = SAMPLER) -> dict:
    loss: Any = task.objective
    start = sampler.start(loss, KEYS, (1, 3, 3)).double()
    pixels = sampler.sample(Guided(task.model, loss), start, KEYS)
    return images(pixels, keys=KEYS)


def journey_features(task: fb.Task, queries: dict) -> Tensor:
    """DDIM written out for one query at a time, gradients by autograd, `[q, P]`."""
    model, loss = task.model, task.objective
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    levels = [round(999 * i / 4) for i in (4, 3, 2, 1, 0)]
    rows = []
    for i in range(len(KEYS)):
        one = {name: column[i : i + 1] for name, column in queries.items()}
        state = SAMPLER.start(loss, one["key"], (1, 3, 3)).double()  # type: ignore[arg-type]
        total = guess = torch.zeros(())
        for here, there in zip(levels, [*levels[1:], None], strict=True):
            share = kept[here].item()
            with torch.no_grad():
                said = model(state, torch.tensor([here]))
                guess = ((state - math.sqrt(1 - share) * said) / math.sqrt(share)).clamp(-1, 1)
            noise = loss.noise_of(one, Point(float(here), 0))  # type: ignore[attr-defined]
            noisy = math.sqrt(share) * guess + math.sqrt(1 - share) * noise
            value = (model(noisy, torch.tensor([here])) - noise).square().mean()
            found = torch.autograd.grad(value, list(model.parameters()))
            total = total + torch.cat([g.flatten() for g in found]) / 5
            if there is not None:
                seen = (state - math.sqrt(share) * guess) / math.sqrt(1 - share)
                ahead = kept[there].item()
                state = math.sqrt(ahead) * guess + math.sqrt(1 - ahead) * seen
        torch.testing.assert_close(guess, one["image"])
        rows.append(total)
    return torch.stack(rows)


def test_scores_are_the_kernel_of_gradients_along_the_way() -> None:
    task, train, _ = case()
    queries = generated(task)
    scores = fb.JourneyTRAK(sampler=SAMPLER).fit(task, train).score(queries).values
    told = features(task, train, SCALARS["loss"])
    expected = kernel(journey_features(task, queries), told)
    torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-12)


def test_saved_and_loaded_it_gives_the_same_scores(tmp_path: Path) -> None:
    task, train, _ = case()
    queries = generated(task)
    fitted = fb.JourneyTRAK(sampler=SAMPLER, function="square_norm").fit(task, train, batch_size=2)
    fitted.save(tmp_path)
    loaded = fb.load(tmp_path, task, train)
    torch.testing.assert_close(loaded.score(queries).values, fitted.score(queries).values)
    torch.testing.assert_close(loaded.self_influence(), fitted.self_influence())
    assert task.measure is None


def test_images_that_were_not_generated_so_are_refused() -> None:
    task, train, queries = case()
    fitted = fb.JourneyTRAK(sampler=SAMPLER).fit(task, train)
    with pytest.raises(fb.errors.DataError, match=r"sampling from keys 5\d"):
        fitted.score(queries)
    other = generated(task)
    assert torch.isfinite(fitted.score(other).values).all()
    with pytest.raises(fb.errors.DataError, match=r"Sampler\.start"):
        fitted.score({**other, "key": other["key"] + 1})


def test_a_task_that_does_not_denoise_is_refused() -> None:
    task, train, _ = case()
    plain = fb.Task(task.model, lambda model, batch: task.loss(model, batch))
    with pytest.raises(fb.errors.TaskError, match="journey_trak follows the sampling"):
        fb.JourneyTRAK().fit(plain, train)


def test_networks_with_continuous_noise_have_journeys_too() -> None:
    torch.manual_seed(0)
    model = Denoiser((1, 3, 3), 8, form="clean").double()
    for parameter in model.out.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    loss = fb.losses.Denoising(Continuous(0.75, most=20.0), "x0", levels=3)
    task, sampler = fb.Task(model, loss), Sampler(steps=8)
    _, train, _ = case()
    queries = generated(task, sampler)
    scores = fb.JourneyTRAK(sampler=sampler).fit(task, train).score(queries).values
    assert torch.isfinite(scores).all()
    assert scores.std() > 0


def test_a_guided_query_names_its_empty_condition() -> None:
    torch.manual_seed(0)
    model = Denoiser((1, 3, 3), 8, conditions=2).double()
    loss = fb.losses.Denoising(levels=3)
    task, sampler = fb.Task(model, loss), Sampler(steps=4, clip=True)
    _, plain, _ = case()
    condition = torch.eye(2, dtype=torch.float64)[torch.arange(14) % 2]
    train = images(plain["image"], condition)
    told, without = condition[:3], torch.zeros(3, 2, dtype=torch.float64)
    guided = Guided(model, loss, told, 3.0, without)
    pixels = sampler.sample(guided, sampler.start(loss, KEYS, (1, 3, 3)).double(), KEYS)
    queries = {**images(pixels, told, keys=KEYS), "without": without}
    fitted = fb.JourneyTRAK(sampler=sampler, guidance=3.0).fit(task, train)
    assert torch.isfinite(fitted.score(queries).values).all()
    with pytest.raises(fb.errors.TaskError, match="compares two conditions"):
        fitted.score(images(pixels, told, keys=KEYS))
