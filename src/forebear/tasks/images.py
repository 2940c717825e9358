"""What every batch of images must be, whatever method reads it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.data import require_finite
from forebear.errors import DataError

RANGE = 10.0
"""Noise has size one, and images that reach further than this were not scaled to it.

Pixels mostly lie from -1 to 1, and standardised ones and latents within 5 or 6; unscaled ones reach
16 (scikit-learn's digits) or 255.
"""


def require_batch(batch: Any) -> None:
    """Refuse a batch that is not `{"image": [b, ...], "key": [b], ...}` with images as in training.

    Raises:
        DataError: columns are missing or of another type or shape, or images are not scaled; with
            the positions of the images in `rows`.
        NonFiniteError: a pixel is NaN or infinite; with the positions of the images in `rows`.
    """
    if not hasattr(batch, "keys") or not {"image", "key"} <= set(batch):
        found = f"has {', '.join(map(str, batch))}" if hasattr(batch, "keys") else type_of(batch)
        raise DataError(
            f"a batch of a diffusion task is a dict with 'image' and 'key', and this one {found}: "
            "make the dataset with forebear.tasks.diffusion.images(pixels, condition)"
        )
    image, key = batch["image"], batch["key"]
    require_scaled(image)
    if not isinstance(key, Tensor) or key.is_floating_point() or key.shape != image.shape[:1]:
        found = f"{name_of(key)} {tuple(key.shape)}" if isinstance(key, Tensor) else type_of(key)
        raise DataError(
            f"'key' is {found} for {len(image)} images: noise belongs to an integer for each"
        )


def require_scaled(image: Any) -> None:
    """Refuse what is no batch of images `[b, ...]` scaled as in training.

    Raises:
        DataError: it is no tensor, has no pixels, is not of floating point or not scaled.
        NonFiniteError: a pixel is NaN or infinite.
    """
    if not isinstance(image, Tensor):
        raise DataError(f"images are a {type_of(image)}: give tensors, as torch.from_numpy does")
    if not image.is_floating_point():
        raise DataError(
            f"images are of type {name_of(image)}: scale them as in training, for example "
            "pixels / 127.5 - 1"
        )
    if image.ndim < 2:
        raise DataError(
            f"images have shape {tuple(image.shape)}: the first axis counts them, and pixels are "
            "in those behind it, as in [n, c, h, w]"
        )
    if not image.numel():
        return
    try:
        low, high = (bound.item() for bound in image.detach().aminmax())
    except RuntimeError:
        return  # inside torch.func.vmap or a trace no number is known
    if low >= -RANGE and high <= RANGE:  # both are NaN where one pixel is
        return
    require_finite(image, "image")
    sizes = image.detach().flatten(1).abs().amax(1)
    error = DataError(
        f"{int((sizes > RANGE).sum())} of {len(image)} images reach up to "
        f"{sizes.max().item():.4g}: scale them as in training, mostly from -1 to 1"
    )
    error.rows = torch.nonzero(sizes > RANGE)[:, 0]
    raise error


def keys_of(keys: Any, count: int | None = None, *, repeated: bool = False) -> Tensor:
    """Keys `[n]` of images; positions where none are given.

    Args:
        keys: a sequence or tensor of integers.
        count: how many images there are; as many as keys when None.
        repeated: whether several may have one key.

    Raises:
        DataError: they are no integers, not one for each image, or repeat.
    """
    if keys is None:
        return torch.arange(count or 0)
    try:
        own = keys if isinstance(keys, Tensor) else torch.as_tensor(np.asarray(keys))
    except (TypeError, ValueError):
        own = None
    if own is not None and not own.numel():  # nothing has no type
        own = own.long()
    if own is None or own.is_floating_point() or own.is_complex() or own.dtype == torch.bool:
        found = "text or mixed" if own is None else f"of type {name_of(own)}"
        raise DataError(f"keys are {found}: noise belongs to an integer for each image")
    if own.ndim != 1 or count not in (None, len(own)):
        given = "" if count is None else f" were given for {count} images"
        raise DataError(f"keys of shape {tuple(own.shape)}{given}: give one integer each")
    values, counts = own.unique(return_counts=True)
    if len(values) < len(own) and not repeated:
        most = counts.argmax()
        raise DataError(
            f"key {values[most].item()} is given {counts[most].item()} times, and images with one "
            "key have one noise: give each its own, or ask for Denoising(noise='shared')"
        )
    return own.long()


def require_conditions(condition: Any, count: int) -> None:
    """Refuse conditions that are not one for each of so many images.

    Raises:
        DataError: they are no tensor, or more or fewer.
    """
    if not isinstance(condition, Tensor):
        raise DataError(
            f"conditions are a {type_of(condition)}: give a tensor [n, ...], of classes or of "
            "embedded texts"
        )
    if condition.shape[:1] != (count,):
        raise DataError(
            f"conditions of shape {tuple(condition.shape)} were given for {count} images: give "
            "one each"
        )


def name_of(tensor: Tensor) -> str:
    """The name of a tensor's type, as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def type_of(value: Any) -> str:
    """The name of a value's type."""
    return type(value).__name__
