"""Encoders of images by which they are compared: CLIP, DINO, SSCD, when the weights are there.

Nothing is downloaded: weights are a folder that `save_pretrained` wrote, or a TorchScript file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from forebear.errors import DataError, FormatError, MissingDependencyError
from forebear.metrics.cosine import cosine_similarity

CLIP_MEAN, CLIP_DEVIATION = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

BATCH = 64


@dataclass(frozen=True, eq=False)
class Encoder:
    """Features of images, `encoder(images) -> [b, d]`.

    Attributes:
        model: gives features `[b, d]` of colour images `[b, 3, size, size]`, normalised.
        size: side that images are scaled to; the longer side is cropped.
        mean: of each colour, from 0 to 1, that is taken off.
        deviation: of each colour, that it is divided by.
    """

    model: Any
    size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    deviation: tuple[float, float, float] = IMAGENET_DEVIATION

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features `[b, d]` of images `[b, 1 or 3, h, w]` from -1 to 1.

        Raises:
            DataError: images have another number of channels.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DataError(
                f"images are of shape {tuple(images.shape)}: encoders see [b, 1 or 3, h, w]; "
                "decode latents first"
            )
        return torch.cat([self.model(self._seen(part)).float() for part in images.split(BATCH)])

    def distance(self, images: Tensor, others: Tensor) -> np.ndarray:
        """One minus the cosine of the features of each pair, `[b]`."""
        return 1 - cosine_similarity(self(images), self(others))

    def _seen(self, images: Tensor) -> Tensor:
        scale = self.size / min(images.shape[2:])
        sides = [max(self.size, round(side * scale)) for side in images.shape[2:]]
        shown = F.interpolate((images + 1) / 2, sides, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - self.size) // 2 for side in sides)
        shown = shown[..., top : top + self.size, left : left + self.size].expand(-1, 3, -1, -1)
        mean, deviation = (shown.new_tensor(x).view(3, 1, 1) for x in (self.mean, self.deviation))
        return (shown - mean) / deviation


def clip(folder: str | Path) -> Encoder:
    """The image side of CLIP (Radford et al., 2021), from a folder of transformers.

    Raises:
        MissingDependencyError: transformers is not installed.
        FormatError: the folder holds no such model.
    """
    model = _loaded(folder, "CLIPVisionModelWithProjection")
    return Encoder(
        lambda images: model(pixel_values=images).image_embeds,
        model.config.image_size,
        CLIP_MEAN,
        CLIP_DEVIATION,
    )


def dino(folder: str | Path) -> Encoder:
    """The first token of DINO (Caron et al., 2021) or DINOv2 (Oquab et al., 2024).

    Raises:
        MissingDependencyError: transformers is not installed.
        FormatError: the folder holds no such model.
    """
    model = _loaded(folder, "AutoModel")
    return Encoder(lambda images: model(pixel_values=images).last_hidden_state[:, 0], 224)


def torchscript(file: str | Path, *, size: int) -> Encoder:
    """A TorchScript file that gives features, such as those of SSCD (Pizzi et al., 2022).

    Args:
        file: what `torch.jit.save` wrote.
        size: side of the images it was trained on; 288 for SSCD.

    Raises:
        FormatError: the file is missing or damaged.
    """
    try:
        model = torch.jit.load(str(file), map_location="cpu").eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise FormatError(f"{file} is no TorchScript model: {error}") from error
    return Encoder(model, size)


def _loaded(folder: str | Path, kind: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "CLIP and DINO are models of transformers: pip install transformers"
        ) from error
    if not (Path(folder) / "config.json").is_file():
        raise FormatError(
            f"{folder} holds no config.json: name a folder that model.save_pretrained(...) wrote"
        )
    try:
        model = getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{folder} holds no {kind} of transformers: {error}") from error
    return model.eval()
