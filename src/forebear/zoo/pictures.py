"""Images that diffusion models are trained on, with the labels that no model needs to see."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forebear.data import Data
from forebear.errors import DataError
from forebear.tasks.diffusion import images

QUERY_KEYS = 10_000
"""Noise of the first query belongs to this key, apart from that of training examples."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A diffusion task on small grey images.

    Attributes:
        name: of the task.
        train: dict dataset as of `forebear.tasks.diffusion.images`, n images from -1 to 1.
        queries: images that were held out.
        labels: int64 `[n]`, class of each training image.
        query_labels: int64 `[q]`.
        classes: name of each class.
    """

    name: str
    train: Data
    queries: Data
    labels: Tensor
    query_labels: Tensor
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image: channels, height, width."""
        return tuple(self.train.batch(slice(0, 1))["image"].shape[1:])


def split_pictures(
    name: str,
    pixels: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    order: np.ndarray,
    *,
    train: int,
    queries: int,
    conditional: bool = False,
) -> Pictures:
    """The first `train` images of an order for training, the next `queries` held out.

    Args:
        name: of the task.
        pixels: `[n, h, w]` from -1 to 1.
        labels: `[n]`.
        classes: name of each class.
        order: positions, `[n]` or fewer.
        train: number of training images.
        queries: number of images held out.
        conditional: whether the label is the condition of the model.

    Raises:
        DataError: there are not that many images.
    """
    if train < 1 or queries < 1 or train + queries > len(order):
        raise DataError(
            f"{train} training images and {queries} queries were asked for: {name} has "
            f"{len(order)} images"
        )
    chosen = order[: train + queries]
    image = torch.from_numpy(pixels[chosen].astype(np.float32))[:, None]
    label = torch.from_numpy(labels[chosen].astype(np.int64))
    told = label if conditional else None
    keys = torch.arange(train), QUERY_KEYS + torch.arange(queries)
    parts = [
        Data(images(image[part], None if told is None else told[part], keys=own))
        for part, own in zip((slice(0, train), slice(train, None)), keys, strict=True)
    ]
    return Pictures(
        name=name,
        train=parts[0],
        queries=parts[1],
        labels=label[:train],
        query_labels=label[train:],
        classes=classes,
    )


def half_subsets(n: int, count: int = 32, *, seed: int = 7) -> Tensor:
    """The first half of so many random orders of numpy's, bool `[count, n]`."""
    random = np.random.RandomState(seed)
    masks = torch.zeros(count, n, dtype=torch.bool)
    for mask in masks:
        mask[torch.from_numpy(random.permutation(n)[: n // 2])] = True
    return masks
