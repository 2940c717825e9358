"""Weights of positions as a see-through picture that is laid over an image."""

import base64
import io

import numpy as np

COLOUR = (226, 78, 18)
STRONGEST = 225
"""Opacity, of 255, of the largest weight."""

CONTRAST = 0.65
"""Power of the weights: below one, weak places show too."""

LEAST = 10.0
"""Training images at the clear end of the scale, at least: few more than one are no contrast."""

LARGEST = 96
"""Side in pixels above which maps are made smaller."""


def overlay(weights: np.ndarray, largest: float) -> str:
    """A data URI of weights `[h, w]`: clear where zero, strongest where `largest`."""
    from PIL import Image

    share = np.clip(weights / largest if largest > 0 else weights * 0, 0, 1)
    pixels = np.empty((*weights.shape, 4), dtype=np.uint8)
    pixels[..., :3] = COLOUR
    pixels[..., 3] = np.rint(share**CONTRAST * STRONGEST)
    picture = Image.fromarray(pixels)
    if max(picture.size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.BOX)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def rarity(entropy: np.ndarray, most: float) -> np.ndarray:
    """From 0, where `most` training images or more stand behind a place, to 1, where one does."""
    return np.clip(1 - entropy / np.log(most), 0, 1)


def behind(entropy: np.ndarray) -> tuple[float, float]:
    """How many training images stand behind a place, at the fewest and at the most."""
    count = np.exp(entropy)
    return float(count.min()), float(count.max())
