"""Images of a dataset, checked: its column `image`, or the first of a tuple."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from forebear.data import Data, naming
from forebear.errors import DataError
from forebear.tasks.images import require_scaled

Shape = tuple[int, int, int]
"""Channels, height and width."""


def images_of(data: Data, rows: slice | Tensor, shape: Shape | None) -> tuple[Tensor, Tensor]:
    """Images `[b, c, h, w]` and the keys of their noise `[b]`, one for all where there are none.

    Args:
        data: of images.
        rows: which.
        shape: of images that are flat rows.

    Raises:
        DataError: there are no images in it, or they are flat and `shape` does not say how.
    """
    batch = data.batch(rows)
    keys = None
    if hasattr(batch, "keys"):
        if "image" not in batch:
            raise DataError(
                f"the dataset has {', '.join(map(str, batch))} and no 'image': make it with "
                "forebear.tasks.diffusion.images(pixels)"
            )
        images, keys = batch["image"], batch.get("key")
    else:
        images = batch[0] if isinstance(batch, list | tuple) else batch
    return shaped(images, shape), torch.zeros(len(images)).long() if keys is None else keys


def shaped(images: Any, shape: Shape | None) -> Tensor:
    """Images as `[b, c, h, w]`."""
    if not isinstance(images, Tensor):
        raise DataError(
            f"images are a {type(images).__name__}: give tensors, or a collate function that does"
        )
    if images.ndim == 3 and shape is None:
        return images[:, None]
    if images.ndim == 4 and shape in (None, tuple(images.shape[1:])):
        return images
    row = tuple(images.shape[1:])
    if shape is None:
        raise DataError(f"images are rows of shape {row}: say NDA(shape=(channels, height, width))")
    if images[:1].numel() != shape[0] * shape[1] * shape[2]:
        raise DataError(f"images are rows of shape {row}, which shape={shape} does not fit")
    return images.reshape(len(images), *shape)


def checked(data: Data, shape: Shape | None, batch_size: int) -> Iterator[Tensor]:
    """Batches of images in order.

    Raises:
        DataError: they are integers, not scaled, or of different shapes.
        NonFiniteError: a pixel is NaN or infinite; with the ids of the images.
    """
    first: tuple[int, ...] | None = None
    for start in range(0, len(data), batch_size):
        rows = slice(start, min(start + batch_size, len(data)))
        images, _ = images_of(data, rows, shape)
        with naming(data, rows):
            require_scaled(images)
        first = first or tuple(images.shape[1:])
        if tuple(images.shape[1:]) != first:
            raise DataError(
                f"images have shapes {first} and {tuple(images.shape[1:])}: give them one size"
            )
        yield images
