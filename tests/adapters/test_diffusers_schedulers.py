"""Schedulers of diffusers as schedules and samplers, held against diffusers' own loops."""

from typing import Any

import pytest
import torch
from torch import Tensor

import forebear as fb
from forebear.errors import TaskError
from forebear.tasks.sampling import Guided, Sampler
from forebear.tasks.schedules import Discrete

diffusers = pytest.importorskip("diffusers")

from tests.diffusers_cases import conditional, conditions, plain, transformer  # noqa: E402

KEYS = torch.tensor([3, 8])


@pytest.mark.parametrize(
    "kind",
    [
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "LMSDiscreteScheduler",
    ],
)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_schedules_add_noise_as_diffusers_does(kind: str, betas: str) -> None:
    scheduler = getattr(diffusers, kind)(
        beta_start=0.0001, beta_end=0.02, beta_schedule=betas, prediction_type="v_prediction"
    )
    schedule, prediction = fb.diffusers.schedule_of(scheduler)
    assert prediction == "v"
    trained = diffusers.DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule=betas)
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 1, 3, 4, 4, generator=generator)
    for level in (0, 10, 500, 999):
        signal, strength = schedule.at(level)
        expected = trained.add_noise(image, noise, torch.tensor([level]))
        torch.testing.assert_close(signal * image + strength * noise, expected)
        velocity = trained.get_velocity(image, noise, torch.tensor([level]))
        loss = fb.losses.Denoising(schedule, prediction)
        torch.testing.assert_close(loss.target(image, noise, level), velocity)


def test_predictions_and_schedules_have_forebears_names() -> None:
    for theirs, ours in (("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "x0")):
        scheduler = diffusers.DDPMScheduler(prediction_type=theirs)
        assert fb.diffusers.schedule_of(scheduler)[1] == ours
    linear, _ = fb.diffusers.schedule_of(diffusers.DDPMScheduler())
    torch.testing.assert_close(linear.tensor, Discrete.linear().tensor, rtol=1e-4, atol=1e-7)
    short, _ = fb.diffusers.schedule_of(diffusers.DDPMScheduler(num_train_timesteps=100))
    assert len(short) == 100


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), "flow matching"),
        (
            lambda: diffusers.DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction"
            ),
            "flow matching",
        ),
        (lambda: diffusers.EDMEulerScheduler(), "no alphas_cumprod"),
        (lambda: diffusers.DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
        (lambda: diffusers.DDPMScheduler(prediction_type="noise"), "prediction_type='noise'"),
        (lambda: torch.nn.Linear(2, 2), "no scheduler"),
    ],
)
def test_what_is_not_supported_says_so(scheduler: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        fb.diffusers.schedule_of(scheduler())


def by_diffusers(scheduler: Any, call: Any, start: Tensor, steps: int, **settings: Any) -> Tensor:
    """The loop of diffusers' pipelines."""
    scheduler.set_timesteps(steps)
    state = start
    with torch.no_grad():
        for step in scheduler.timesteps:
            said = call(state, torch.full((len(state),), int(step)))
            state = scheduler.step(said, step, state, **settings).prev_sample
    return state


DDIM: dict[str, dict[str, Any]] = {
    "as in DDIMPipeline": {"clip_sample": False},
    "trailing": {"clip_sample": False, "timestep_spacing": "trailing"},
    "as in Stable Diffusion": {
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "velocity": {"clip_sample": False, "prediction_type": "v_prediction"},
    "velocity without signal": {
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "clean image": {"clip_sample": False, "prediction_type": "sample"},
}


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("name", DDIM)
def test_images_are_those_of_diffusers_own_loop(name: str, steps: int) -> None:
    model, scheduler = conditional(), diffusers.DDIMScheduler(**DDIM[name])
    told = conditions(model, 2)
    sampler = fb.diffusers.sampler_of(scheduler, steps)
    loss: Any = fb.diffusers.task(model, scheduler).loss
    start = sampler.start(loss, KEYS, (4, 8, 8)).double()
    found = sampler.sample(Guided(model, loss, told), start)

    def call(state: Tensor, levels: Tensor) -> Tensor:
        return model(state, levels, encoder_hidden_states=told).sample

    expected = by_diffusers(scheduler, call, start, steps)
    scale = expected.abs().max()
    assert (found - expected).abs().max() / scale < 1e-5
    levels = [int(level) for level in sampler.timesteps(loss.schedule)]
    assert levels == scheduler.timesteps.tolist()


def test_clipped_images_are_those_of_clipped_outputs() -> None:
    model, scheduler = plain(), diffusers.DDIMScheduler()
    sampler = fb.diffusers.sampler_of(scheduler, 10)
    assert sampler.clip
    loss: Any = fb.diffusers.task(model, scheduler).loss
    start = sampler.start(loss, KEYS, (1, 8, 8)).double()
    found = sampler.sample(Guided(model, loss), start)

    def call(state: Tensor, levels: Tensor) -> Tensor:
        return model(state, levels).sample

    expected = by_diffusers(scheduler, call, start, 10, use_clipped_model_output=True)
    assert found.abs().max() <= 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_guidance_is_that_of_diffusers() -> None:
    model, scheduler = transformer(), diffusers.DDIMScheduler(clip_sample=False)
    told, untold = torch.tensor([1, 2]), torch.tensor([5, 5])
    sampler = fb.diffusers.sampler_of(scheduler, 10)
    loss: Any = fb.diffusers.task(model, scheduler).loss
    start = sampler.start(loss, KEYS, (4, 8, 8)).double()
    guided = Guided(model, loss, told, guidance=4.0, without=untold)

    def call(state: Tensor, levels: Tensor) -> Tensor:
        both = torch.cat([state, state]), torch.cat([levels, levels]), torch.cat([told, untold])
        said, base = model(both[0], timestep=both[1], class_labels=both[2]).sample[:, :4].chunk(2)
        return base + 4.0 * (said - base)

    expected = by_diffusers(scheduler, call, start, 10)
    error = (sampler.sample(guided, start) - expected).abs().max()
    assert error / expected.abs().max() < 1e-5


def test_random_steps_have_the_variance_of_diffusers() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    schedule, _ = fb.diffusers.schedule_of(scheduler)
    sampler = fb.diffusers.sampler_of(scheduler, 10, randomness=0.7)
    assert sampler.randomness == 0.7
    scheduler.set_timesteps(10)
    for here, there in ((900, 800), (300, 200), (100, 0)):
        variance = scheduler._get_variance(here, there).item()
        (signal, noise), (kept, strength) = schedule.at(here), schedule.at(there)
        found = strength**2 / noise**2 * (1 - signal**2 / kept**2)
        assert found == pytest.approx(variance, rel=1e-4)


def test_grids_are_those_of_diffusers() -> None:
    schedule = Discrete.linear()
    for spacing in ("linspace", "leading", "trailing"):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
        for steps in (1, 3, 7, 10, 50, 999, 1000):
            if spacing == "linspace" and steps == 1:
                continue  # numpy's grid of one number is its first, the clean image
            scheduler.set_timesteps(steps)
            sampler = fb.diffusers.sampler_of(scheduler, steps)
            assert sampler.spacing == spacing
            assert sampler.timesteps(schedule) == scheduler.timesteps.tolist(), (spacing, steps)


def test_bounds_of_other_kinds_and_offsets_beyond_the_end_are_refused() -> None:
    with pytest.raises(TaskError, match="thresholding"):
        fb.diffusers.sampler_of(diffusers.DDIMScheduler(thresholding=True))
    with pytest.raises(TaskError, match=r"clip_sample_range is 2.0"):
        fb.diffusers.sampler_of(diffusers.DDIMScheduler(clip_sample_range=2.0))
    with pytest.raises(TaskError, match="use fewer steps"):
        Sampler(1000, spacing="leading", offset=1).timesteps(Discrete.linear())
