"""LPIPS (Zhang et al., 2018): how unlike two images look, when the weights are there.

Nothing is downloaded: weights are the file of a torchvision network (AlexNet or VGG-16) and that of
the linear weights that its authors fitted to what people saw.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from forebear.errors import DataError, FormatError

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of the three colours of images from -1 to 1, as LPIPS has them."""

LEAST = 64
"""Smaller images are enlarged to this side: AlexNet leaves nothing of them."""

BATCH = 32


class Layer(NamedTuple):
    """A convolution with its ReLU, or a pooling where there is no number.

    Attributes:
        number: of the convolution among the layers of torchvision's `features`.
        stride: of the convolution.
        padding: of the convolution.
        compared: whether its output is compared.
    """

    number: int | None
    stride: int = 1
    padding: int = 1
    compared: bool = False


POOL = Layer(None)

ALEXNET = (
    Layer(0, 4, 2, True),
    POOL,
    Layer(3, 1, 2, True),
    POOL,
    *(Layer(number, compared=True) for number in (6, 8, 10)),
)
VGG = (
    *(Layer(0), Layer(2, compared=True), POOL),
    *(Layer(5), Layer(7, compared=True), POOL),
    *(Layer(10), Layer(12), Layer(14, compared=True), POOL),
    *(Layer(17), Layer(19), Layer(21, compared=True), POOL),
    *(Layer(24), Layer(26), Layer(28, compared=True)),
)
LAYERS: dict[tuple[int, ...], tuple[tuple[Layer, ...], int]] = {
    (64, 3, 11, 11): (ALEXNET, 3),
    (64, 3, 3, 3): (VGG, 2),
}
"""Layers and side of the pooling, by the shape of the first convolution."""


@dataclass(frozen=True, eq=False)
class LPIPS:
    """A distance of pairs of images, from the weights of a network.

    Attributes:
        trunk: `features.*` of torchvision's AlexNet or VGG-16.
        linear: weights `[channels]` of every layer that is compared.
    """

    trunk: dict[str, Tensor] = field(repr=False)
    linear: tuple[Tensor, ...] = field(repr=False)

    @torch.no_grad()
    def distance(self, images: Tensor, others: Tensor) -> np.ndarray:
        """How unlike the images of each pair look, `[b]`; zero for the same image.

        Args:
            images: `[b, 1 or 3, h, w]` from -1 to 1.
            others: the same.

        Raises:
            DataError: they are of other shapes.
        """
        if images.shape != others.shape or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DataError(
                f"images are of shapes {tuple(images.shape)} and {tuple(others.shape)}: LPIPS "
                "compares pairs [b, 1 or 3, h, w]; decode latents first"
            )
        pairs = zip(images.split(BATCH), others.split(BATCH), strict=True)
        return torch.cat([self._batch(one, other) for one, other in pairs]).double().numpy()

    def _batch(self, images: Tensor, others: Tensor) -> Tensor:
        total = images.new_zeros(len(images), dtype=torch.float32)
        layers = zip(self._outputs(images), self._outputs(others), self.linear, strict=True)
        for one, other, weights in layers:
            squares = (_unit(one) - _unit(other)).square()
            total += (squares * weights.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total

    def _outputs(self, images: Tensor) -> Iterator[Tensor]:
        """What the layers that are compared say, after their ReLU."""
        if min(images.shape[2:]) < LEAST:
            scale = LEAST / min(images.shape[2:])
            sides = [round(side * scale) for side in images.shape[2:]]
            images = F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(-1, 1)
        shift, scales = (torch.tensor(x).view(3, 1, 1) for x in (SHIFT, SCALE))
        state = (images.float().expand(-1, 3, -1, -1) - shift) / scales
        layers, side = LAYERS[tuple(self.trunk["features.0.weight"].shape)]
        for layer in layers:
            if layer.number is None:
                state = F.max_pool2d(state, side, 2)
                continue
            weight, bias = (self.trunk[f"features.{layer.number}.{k}"] for k in ("weight", "bias"))
            state = F.conv2d(state, weight, bias, layer.stride, layer.padding).relu()
            if layer.compared:
                yield state


def lpips(trunk: str | Path, linear: str | Path) -> LPIPS:
    """The distance of weights on disk.

    Args:
        trunk: torchvision's weights of AlexNet (`alexnet-owt-7be5be79.pth`) or VGG-16.
        linear: those of LPIPS for that network (`alex.pth` or `vgg.pth`, version 0.1).

    Raises:
        FormatError: a file is missing, damaged, or of another network.
    """
    state = {k: v.float() for k, v in _read(trunk).items() if k.startswith("features.")}
    first = state.get("features.0.weight")
    if first is None or tuple(first.shape) not in LAYERS:
        raise FormatError(f"{trunk} is neither AlexNet nor VGG-16 of torchvision")
    layers, _ = LAYERS[tuple(first.shape)]
    compared = [layer.number for layer in layers if layer.compared]
    found = _read(linear)
    weights = [found.get(f"lin{i}.model.1.weight") for i in range(len(compared))]
    for number, own in zip(compared, weights, strict=True):
        channels = state[f"features.{number}.weight"].shape[0]
        if own is None or own.numel() != channels:
            raise FormatError(
                f"{linear} has no {channels} linear weights for layer {number} of {trunk}: take "
                "those of the same network"
            )
    return LPIPS(state, tuple(own.float().flatten() for own in weights if own is not None))


def _read(file: str | Path) -> dict[str, Tensor]:
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # pickle has errors of many kinds
        raise FormatError(f"{file} holds no weights: {type(error).__name__}: {error}") from error


def _unit(features: Tensor) -> Tensor:
    """Of unit length at every place, over channels."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
