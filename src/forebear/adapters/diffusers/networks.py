"""Networks of diffusers as tasks: how they are called, what they are told, their attention."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forebear.adapters.diffusers.schedulers import schedule_of
from forebear.errors import DataError, NonFiniteError, NumericalWarning, TaskError
from forebear.task import Task
from forebear.tasks.diffusion import Denoising, Pairing
from forebear.tasks.schedules import Level

Told = Literal["nothing", "class", "text"]

KINDS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
"""Networks that can be called; classes that derive from them too."""

KEYS_AND_VALUES = ("to_k", "to_v", "add_k_proj", "add_v_proj")
"""Layers of cross-attention that read the condition."""


@dataclass(frozen=True)
class NetworkCall:
    """How a network of diffusers is called: `call(model, noisy, levels, condition)`.

    Attributes:
        kind: class of the network.
        told: what it is told.
        width: of a token of the condition, for `"text"`.
    """

    kind: str
    told: Told
    width: int | None = None

    def __call__(self, model: nn.Module, noisy: Tensor, levels: Tensor, condition: Any) -> Tensor:
        """The prediction `[b, ...]`, without a learned variance, in the type of `noisy` or better.

        Raises:
            DataError: the condition is missing, or does not fit the network.
            NonFiniteError: a network of reduced precision overflows.
        """
        self.require(condition)
        dtype = next(model.parameters()).dtype
        if condition is not None and condition.is_floating_point():
            condition = condition.to(dtype)
        named = "encoder_hidden_states" if self.told == "text" else "class_labels"
        told = {} if condition is None else {named: condition}
        said = model(noisy.to(dtype), timestep=levels, **told).sample
        said = said[:, : noisy.shape[1]]  # the rest is a learned variance
        if dtype in (torch.float16, torch.bfloat16):
            _require_no_overflow(said, levels, dtype)
        return said.to(torch.promote_types(noisy.dtype, said.dtype))

    def require(self, condition: Any) -> None:
        """The condition is one that the network takes.

        Raises:
            DataError: it is not.
        """
        wanted = {
            "nothing": "no condition",
            "class": "a class label for each image, condition [n]",
            "text": f"embedded texts, condition [n, tokens, {self.width}]",
        }[self.told]
        if condition is None and self.told == "nothing":
            return
        if condition is None:
            raise DataError(
                f"{self.kind} is told {wanted}, and the images have none: pass condition= or "
                "prompts= where they are made"
            )
        shape = tuple(condition.shape)
        fits = {
            "nothing": False,
            "class": True,
            "text": len(shape) == 3 and shape[-1] == self.width,
        }[self.told]
        if not fits:
            raise DataError(f"{self.kind} is told {wanted}, and a condition is of shape {shape}")


def task(
    pipeline: Any,
    scheduler: Any = None,
    *,
    levels: int | Sequence[Level] = 10,
    draws: int = 1,
    noise: Pairing = "shared",
    seed: int = 0,
    layers: str | Sequence[str] | None = None,
    checkpoints: Sequence[Any] | None = None,
) -> Task:
    """The denoising task of a pipeline: its network, and the loss that it was trained with.

    What is attributed are the parameters that require gradients: all of a pipeline that was loaded,
    and those of the adapters alone where the network has some of peft (LoRA), which freezes the
    rest.

    Args:
        pipeline: of diffusers with a `UNet2DModel`, `UNet2DConditionModel` or
            `DiTTransformer2DModel`; or such a network alone, with the weights that images are made
            with (the moving average, where training keeps one).
        scheduler: of training; the pipeline's own when left out.
        levels: timesteps to average over; a number chooses so many.
        draws: of noise at each level.
        noise: `"shared"`: all images have the same noise at a level; `"example"`: each its own.
        seed: of the noise.
        layers: names or patterns of modules, such as `cross_attention(pipeline)`.
        checkpoints: weights of the network at other moments of training.

    Raises:
        TaskError: the network or scheduler is of a kind that is not supported, or the two, or two
            schedulers, disagree.
    """
    model = network_of(pipeline)
    loss = loss_of(pipeline, scheduler, levels=levels, draws=draws, noise=noise, seed=seed)
    if any(p.dtype == torch.float16 for p in model.parameters()):
        warnings.warn(
            f"{type(model).__name__} is in float16, in which gradients below 6e-8 are zero: use "
            "float32 to attribute to it, for example pipeline.to(torch.float32)",
            NumericalWarning,
            stacklevel=2,
        )
    return Task(model, loss, layers=layers, checkpoints=checkpoints)


def loss_of(pipeline: Any, scheduler: Any = None, **settings: Any) -> Denoising:
    """The denoising loss of a pipeline; `settings` are those of `Denoising`."""
    model = network_of(pipeline)
    own = getattr(pipeline, "scheduler", None)
    chosen = own if scheduler is None else scheduler
    if chosen is None:
        raise TaskError(
            f"{type(model).__name__} does not know its noise schedule: pass scheduler=, such as "
            "the DDPMScheduler of training"
        )
    schedule, prediction = schedule_of(chosen)
    if own is not None and own is not chosen:
        _require_same_schedule(schedule_of(own), (schedule, prediction))
    call = call_of(model)
    _require_variance(model, chosen)
    return Denoising(schedule, prediction, call=call, **settings)


def network_of(pipeline: Any) -> Any:
    """The denoising network of a pipeline, or the network itself.

    Raises:
        TaskError: there is none.
    """
    if isinstance(pipeline, nn.Module):
        return pipeline
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return getattr(pipeline, name)
    raise TaskError(f"{type(pipeline).__name__} has no unet and no transformer: pass the network")


def call_of(model: Any) -> NetworkCall:
    """How a network is called.

    Raises:
        TaskError: it is of a kind, or has inputs, that are not supported.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft around it
    names = [cls.__name__ for cls in type(base).__mro__]
    kind = next((name for name in KINDS if name in names), None)
    if kind is None:
        raise TaskError(
            f"{type(base).__name__} is not supported: {', '.join(KINDS)} are; for another network "
            "write a Task with fb.losses.Denoising(schedule, prediction, call=)"
        )
    config = base.config
    taken, given = channels_of(base), config.get("out_channels") or config["in_channels"]
    if given not in (taken, 2 * taken):
        raise TaskError(
            f"{kind} takes {taken} channels and gives {given}: networks that are told more than "
            "the noisy image (a mask, another image) are not supported"
        )
    if kind == "DiTTransformer2DModel":
        return NetworkCall(kind, "class")
    labelled = config.get("class_embed_type") or config.get("num_class_embeds")
    if kind == "UNet2DModel":
        return NetworkCall(kind, "class" if labelled else "nothing")
    more = [name for name in ("addition_embed_type", "class_embed_type") if config.get(name)]
    if more or config.get("num_class_embeds"):
        raise TaskError(
            f"{kind} has {', '.join(more) or 'num_class_embeds'}: networks that are told more than "
            "embedded texts, as those of SDXL, are not supported"
        )
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    return NetworkCall(kind, "text", width if isinstance(width, int) else width[0])


def channels_of(model: Any) -> int:
    """Of the images that a network takes noise off."""
    return model.config["in_channels"]


def cross_attention(pipeline: Any, parts: Sequence[str] = KEYS_AND_VALUES[:2]) -> tuple[str, ...]:
    """Names of the layers that read the condition: keys and values of cross-attention.

    Args:
        pipeline: or its network.
        parts: of each attention module.

    Raises:
        TaskError: the network has no cross-attention.
    """
    found = _attention_parts(network_of(pipeline), parts, crossed=True)
    if not found:
        raise TaskError(
            f"{type(network_of(pipeline)).__name__} has no cross-attention: leave layers= out, or "
            "use attention(pipeline)"
        )
    return found


def attention(
    pipeline: Any, parts: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
) -> tuple[str, ...]:
    """Names of the layers of all attention modules.

    Args:
        pipeline: or its network.
        parts: of each attention module.

    Raises:
        TaskError: the network has no attention.
    """
    found = _attention_parts(network_of(pipeline), parts, crossed=False)
    if not found:
        raise TaskError(f"{type(network_of(pipeline)).__name__} has no attention: name layers")
    return found


def _attention_parts(model: nn.Module, parts: Sequence[str], *, crossed: bool) -> tuple[str, ...]:
    names = dict(model.named_modules())
    return tuple(
        f"{name}.{part}"
        for name, module in names.items()
        if hasattr(module, "is_cross_attention") and (module.is_cross_attention or not crossed)
        for part in parts
        if f"{name}.{part}" in names
    )


def _require_same_schedule(own: Any, given: Any) -> None:
    if own[1] != given[1]:
        raise TaskError(
            f"the pipeline's scheduler has prediction {own[1]!r} and scheduler= {given[1]!r}: pass "
            "the one of training"
        )
    if len(own[0]) != len(given[0]) or not torch.allclose(own[0].tensor, given[0].tensor):
        raise TaskError(
            "the pipeline's scheduler and scheduler= have different noise schedules: pass the one "
            "of training"
        )


def _require_variance(model: Any, scheduler: Any) -> None:
    """A scheduler that reads a variance needs a network that gives one."""
    learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    given = base.config.get("out_channels") or channels_of(base)
    if learned and given == channels_of(base):
        raise TaskError(
            f"{type(scheduler).__name__} has variance_type="
            f"{scheduler.config['variance_type']!r} and {type(base).__name__} gives no variance: "
            "one of them is not as in training"
        )


def _require_no_overflow(said: Tensor, levels: Tensor, dtype: torch.dtype) -> None:
    wrong = ~torch.isfinite(said.detach()).flatten(1).all(1)
    if wrong.any():
        level = levels[wrong][0].item()
        raise NonFiniteError(
            f"at timestep {level} the network gives NaN or infinity for {int(wrong.sum())} of "
            f"{len(said)} images: {str(dtype).removeprefix('torch.')} overflows; use float32, for "
            "example pipeline.to(torch.float32)"
        )
