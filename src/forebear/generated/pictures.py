"""Images of a task as small picture files that any viewer opens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.data import Data
from forebear.errors import DataError

Decode = Callable[[Tensor], Tensor]
"""From what the model makes, `[b, ...]`, to pictures `[b, 1 or 3, h, w]` from -1 to 1."""

LARGE, SMALL = 384, 160
"""Longest side of the pictures of generated and of training images, in pixels."""

EXACT = 64
"""Side up to which pictures are kept pixel by pixel, as PNG; larger ones become JPEG."""

QUALITY = 82

AT_A_TIME, DECODED = 16, 4
"""Images read, and decoded, at a time."""


def shown(images: Tensor, decode: Decode | None) -> Tensor:
    """Pictures `[b, 1 or 3, h, w]` from -1 to 1.

    Raises:
        DataError: they are none.
    """
    pictures = images
    if decode is not None:
        with torch.no_grad():
            pictures = torch.cat([decode(some) for some in images.split(DECODED)])
    if not is_picture(pictures):
        what = "decode= gives" if decode is not None else "images are"
        raise DataError(
            f"{what} {tuple(pictures.shape)}, which cannot be shown: pass decode=, a function from "
            "what the model makes to pictures [b, 1 or 3, height, width] from -1 to 1"
        )
    return pictures.detach().float().cpu().clamp(-1, 1)


def is_picture(images: Any) -> bool:
    """Whether a batch can be shown as it is: `[b, 1 or 3, h, w]`."""
    return isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] in (1, 3)


@dataclass(frozen=True)
class Album:
    """Writes pictures into the folder of a run.

    Attributes:
        folder: of the run.
        decode: of the task's images.
    """

    folder: Path
    decode: Decode | None = None

    def keep(self, images: Tensor, names: list[str], *, longest: int = LARGE) -> list[str]:
        """Write images `[b, ...]`, and return their files; what is there is written again."""
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        pictures = shown(images, self.decode)
        return [
            self._write(picture, name, longest)
            for picture, name in zip(pictures, names, strict=True)
        ]

    def keep_training(self, train: Data, positions: list[int]) -> dict[int, str]:
        """Write small pictures of some training images; only those are ever read."""
        files: dict[int, str] = {}
        for start in range(0, len(positions), AT_A_TIME):
            some = positions[start : start + AT_A_TIME]
            batch = train.batch(torch.tensor(some))
            names = [f"train-{position:07d}" for position in some]
            written = self.keep(batch["image"], names, longest=SMALL)
            files.update(zip(some, written, strict=True))
        return files

    def _write(self, picture: Tensor, name: str, longest: int) -> str:
        from PIL import Image

        pixels = ((picture.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        exact = max(image.size) <= EXACT
        if max(image.size) > longest:
            image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        file = f"pictures/{name}.{'png' if exact else 'jpg'}"
        path = self.folder / file
        partial = path.with_name(f"{path.name}.partial")
        if exact:
            image.save(partial, "PNG", optimize=True)
        else:
            image.save(partial, "JPEG", quality=QUALITY, optimize=True)
        partial.replace(path)
        return file
