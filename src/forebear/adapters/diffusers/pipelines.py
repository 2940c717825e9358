"""Pipelines from disk, and folders of images as a pipeline's network sees them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forebear.adapters.diffusers.folders import folder
from forebear.adapters.diffusers.latents import embed, latents
from forebear.adapters.diffusers.networks import call_of, channels_of, network_of
from forebear.data import Data
from forebear.errors import DataError, FormatError, MissingDependencyError, TaskError


def load(path: str | Path, *, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
    """A pipeline that was saved with `save_pretrained`, from disk alone, in full precision.

    Args:
        path: of the folder.
        dtype: of weights; gradients in float16 are mostly zero.
        parts: passed on, such as `safety_checker=None`.

    Raises:
        MissingDependencyError: diffusers is not installed.
        FormatError: the folder holds no pipeline.
    """
    try:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    except ImportError as error:
        raise MissingDependencyError(
            "diffusers is not installed: pip install 'forebear[diffusers]'"
        ) from error
    if not (Path(path) / "model_index.json").is_file():
        raise FormatError(f"{path} holds no pipeline: save one with pipeline.save_pretrained(path)")
    pipeline = DiffusionPipeline.from_pretrained(str(path), local_files_only=True, **parts)
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    saved = {parameter.dtype for network in networks for parameter in network.parameters()}
    return pipeline if saved == {dtype} else pipeline.to(dtype)


def images(
    pipeline: Any,
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    condition: Any = None,
    cache: str | Path | None = None,
    batch_size: int = 8,
) -> Data:
    """The images of a folder as the pipeline's network was trained on them.

    Size and channels are the pipeline's; a pipeline with an autoencoder has them encoded, and one
    that is told texts has their captions embedded, each once.

    Args:
        pipeline: of diffusers, or a network alone.
        path: of the folder; see `folder` and `captions`.
        size: of images; the pipeline's when left out.
        condition: for networks that are told a class: labels, or `"folder"`.
        cache: folder where encoded images are kept; needed with an autoencoder.
        batch_size: images to encode at a time.

    Raises:
        DataError: images cannot be read, or have no condition or caption.
        TaskError: the pipeline is not supported, or cache is missing.
    """
    model = network_of(pipeline)
    call = call_of(model)
    vae = getattr(pipeline, "vae", None)
    channels = channels_of(model) if vae is None else vae.config["in_channels"]
    if channels not in (1, 3):
        raise TaskError(
            f"the network sees images of {channels} channels, and files have 1 or 3: make a "
            "dataset with forebear.tasks.diffusion.images"
        )
    if vae is not None and cache is None:
        raise TaskError("the pipeline encodes images: pass cache=, a folder to keep them in")
    texts = call.told == "text" and condition is None
    if call.told == "class" and condition is None:
        raise DataError(
            f"{call.kind} is told a class: pass condition= labels, or condition='folder' where "
            "each class has a folder"
        )
    data = folder(
        path,
        size=_size(pipeline, size),
        grey=channels == 1,
        condition=condition,
        prompts=partial(embed, pipeline) if texts else None,
    )
    if vae is None:
        return data
    assert cache is not None
    return latents(pipeline, data, cache=cache, batch_size=batch_size)


def shape_of(pipeline: Any, size: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
    """Channels, height and width that the network takes noise off.

    Args:
        pipeline: or its network.
        size: of pictures; the pipeline's own when left out.
    """
    height, width = _size(pipeline, size)
    step = _reduction(pipeline)
    return channels_of(network_of(pipeline)), height // step, width // step


def _size(pipeline: Any, size: int | Sequence[int] | None) -> tuple[int, int]:
    """Height and width of pictures."""
    if size is None:
        own = network_of(pipeline).config.get("sample_size")
        if own is None:
            raise TaskError("the network has no sample_size: pass size=")
        sides = (own, own) if isinstance(own, int) else tuple(own)
        step = _reduction(pipeline)
        return sides[0] * step, sides[1] * step
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return height, width


def _reduction(pipeline: Any) -> int:
    """Pixels to a side of what the network sees as one."""
    vae = getattr(pipeline, "vae", None)
    return 1 if vae is None else 2 ** (len(vae.config["block_out_channels"]) - 1)
