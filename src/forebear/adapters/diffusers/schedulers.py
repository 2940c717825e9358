"""Schedulers of diffusers as forebear's schedules and samplers."""

from typing import Any

import torch

from forebear.errors import TaskError
from forebear.tasks.diffusion import Prediction
from forebear.tasks.sampling import Sampler
from forebear.tasks.schedules import Discrete

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
"""What diffusers calls a prediction, and what forebear does."""

FIRST_TIMESTEP_DEFAULT = ("DDIMScheduler", "DDIMParallelScheduler")
"""Schedulers whose last step ends at the first timestep where `set_alpha_to_one` is off."""


def schedule_of(scheduler: Any) -> tuple[Discrete, Prediction]:
    """The noise schedule a model was trained with, and what its network predicts.

    Args:
        scheduler: of diffusers, with discrete steps of constant variance: `DDPMScheduler`,
            `DDIMScheduler`, `PNDMScheduler`, `EulerDiscreteScheduler`,
            `DPMSolverMultistepScheduler` and others that have `alphas_cumprod`.

    Raises:
        TaskError: the scheduler is of another kind (flow matching, EDM), or its schedule and its
            prediction disagree.
    """
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", None)
    if config is None:
        raise TaskError(f"{name} is no scheduler of diffusers: pass pipeline.scheduler")
    said = config.get("prediction_type", "epsilon")
    if "FlowMatch" in name or said == "flow_prediction" or config.get("use_flow_sigmas"):
        raise TaskError(
            f"{name} is one of flow matching, whose networks predict velocities between noise and "
            "image: supported are schedulers with alphas_cumprod, such as DDPMScheduler"
        )
    shares = getattr(scheduler, "alphas_cumprod", None)
    if shares is None:
        raise TaskError(
            f"{name} has no alphas_cumprod: supported are discrete schedules of constant variance; "
            "for an EDM network write a Task with fb.losses.Denoising(Continuous(...), 'x0', call=)"
        )
    if said not in PREDICTIONS:
        known = ", ".join(map(repr, PREDICTIONS))
        raise TaskError(f"{name} has prediction_type={said!r}: supported are {known}")
    shares = torch.as_tensor(shares)
    if said == "epsilon" and shares[-1] <= 0:
        raise TaskError(
            f"{name} has rescale_betas_zero_snr and prediction_type='epsilon': the last timestep "
            "is all noise, which such a network cannot learn from; one of them is not as in "
            "training (prediction_type is then 'v_prediction')"
        )
    return Discrete.of(shares), PREDICTIONS[said]


def sampler_of(scheduler: Any, steps: int = 50, *, randomness: float = 0.0) -> Sampler:
    """DDIM at the timesteps that a scheduler of diffusers visits.

    With `DDIMScheduler` the images are those of its own loop where its steps are as long as the
    grid is wide: `timestep_spacing="leading"`, and `"trailing"` where `steps` divides the number of
    timesteps. A clean image that is clipped decides the noise as well, as with diffusers'
    `use_clipped_model_output=True`.

    Args:
        scheduler: whose settings are taken.
        steps: calls of the network.
        randomness: η.

    Raises:
        TaskError: the scheduler bounds clean images in a way of its own.
    """
    config = scheduler.config
    clip = bool(config.get("clip_sample", False))
    if config.get("thresholding"):
        raise TaskError("thresholding=True bounds clean images one by one: write a Sampler instead")
    if clip and config.get("clip_sample_range", 1.0) != 1.0:
        raise TaskError(
            f"clip_sample_range is {config['clip_sample_range']}: a Sampler keeps images within -1 "
            "and 1"
        )
    to_first = type(scheduler).__name__ in FIRST_TIMESTEP_DEFAULT and not config.get(
        "set_alpha_to_one", True
    )
    return Sampler(
        steps=steps,
        randomness=randomness,
        clip=clip,
        spacing=config.get("timestep_spacing", "leading"),
        offset=config.get("steps_offset", 0),
        to_first=to_first,
    )
