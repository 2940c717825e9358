"""Images that a pipeline makes from noise that forebear knows, and can begin with again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from forebear.adapters.diffusers.latents import embed
from forebear.adapters.diffusers.networks import call_of, loss_of, network_of
from forebear.adapters.diffusers.pipelines import shape_of
from forebear.adapters.diffusers.schedulers import sampler_of
from forebear.data import Data
from forebear.errors import DataError
from forebear.progress import track
from forebear.tasks.images import keys_of
from forebear.tasks.sampling import Guided, Sampler


def generated(
    pipeline: Any,
    keys: Sequence[int],
    *,
    prompts: str | Sequence[str] | None = None,
    condition: Tensor | None = None,
    without: Tensor | None = None,
    guidance: float = 1.0,
    sampler: Sampler | int = 50,
    scheduler: Any = None,
    size: int | tuple[int, int] | None = None,
    ids: Sequence[str] | None = None,
    batch_size: int = 8,
) -> Data:
    """Images made by a pipeline, as queries.

    The noise that each begins with belongs to its key (`Sampler.start`), so that a model trained on
    other data can be asked for the same image. The images are those that the network makes: codes,
    where the pipeline has an autoencoder; `decode` makes pictures of them.

    Args:
        pipeline: of diffusers, or a network alone with `scheduler`.
        keys: integers, one an image.
        prompts: what each is to show, or all, for networks that are told texts.
        condition: `[q, ...]` in place of prompts: labels, or embedded texts.
        without: the condition that says nothing, `[q, ...]` or `[1, ...]`, for guidance; the empty
            text, or the label after the last, when left out.
        guidance: 1 follows the condition alone; more leads away from `without`.
        sampler: or the number of its steps; its timesteps are then those of the scheduler.
        scheduler: where the pipeline has none.
        size: of pictures; the pipeline's when left out.
        ids: of the images; `"key 7"` when left out.
        batch_size: images at a time.

    Raises:
        DataError: conditions are missing, or are not as many as keys, which are no integers, or
            repeat without `ids`.
        TaskError: the pipeline is not supported.
        NonFiniteError: a network of reduced precision overflows.
    """
    model, own = network_of(pipeline), keys_of(keys, repeated=True)
    if not len(own):
        raise DataError("keys is empty: name at least one integer")
    loss = loss_of(pipeline, scheduler)
    if isinstance(sampler, int):
        chosen = scheduler if scheduler is not None else pipeline.scheduler
        sampler = sampler_of(chosen, sampler)
    condition = _condition(pipeline, prompts, condition, len(own))
    if guidance != 1.0:
        without = _without(pipeline, without, condition, len(own))
    device, modes = next(model.parameters()).device, {m: m.training for m in model.modules()}
    shape, made = shape_of(pipeline, size), []
    model.eval()
    try:
        for rows in track(_parts(len(own), batch_size), "images"):
            guided = Guided(
                model,
                loss,
                condition=None if condition is None else condition[rows].to(device),
                guidance=guidance,
                without=None if without is None else without[rows].to(device),
            )
            start = sampler.start(loss, own[rows], shape).to(device)
            made.append(sampler.sample(guided, start, own[rows].to(device)).cpu())
    finally:
        for module, mode in modes.items():
            module.training = mode
    dataset = {"image": torch.cat(made), "key": own}
    if condition is not None:
        dataset["condition"] = condition
    return Data(dataset, ids=[f"key {key}" for key in own.tolist()] if ids is None else list(ids))


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _condition(
    pipeline: Any, prompts: str | Sequence[str] | None, condition: Tensor | None, count: int
) -> Tensor | None:
    if prompts is not None:
        if condition is not None:
            raise DataError("prompts= and condition= say the same: pass one of them")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        condition = embed(pipeline, texts)
        if len(condition) == 1:
            condition = condition.expand(count, *condition.shape[1:]).clone()
    call_of(network_of(pipeline)).require(condition)
    if condition is not None and len(condition) != count:
        raise DataError(f"{len(condition)} conditions for {count} keys: give one each")
    return condition


def _without(
    pipeline: Any, without: Tensor | None, condition: Tensor | None, count: int
) -> Tensor | None:
    """What guidance leads away from, `[count, ...]`."""
    call = call_of(network_of(pipeline))
    if without is None and call.told == "text":
        without = embed(pipeline, [""])
    elif without is None and call.kind == "DiTTransformer2DModel":
        without = torch.tensor([network_of(pipeline).config["num_embeds_ada_norm"]])
    if without is None:
        return None
    if condition is not None and without.shape[1:] != condition.shape[1:]:
        raise DataError(
            f"without is of shape {tuple(without.shape)} and condition of "
            f"{tuple(condition.shape)}: they must be alike"
        )
    return without.expand(count, *without.shape[1:]) if len(without) == 1 else without
