"""How alike two images are."""

from typing import Any

import numpy as np

from forebear.errors import DataError
from forebear.metrics.arrays import numbers


def pixel_distance(images: Any, others: Any) -> np.ndarray:
    """Euclidean distance of the pixels of each pair, `[q]`.

    Args:
        images: `[q, c, h, w]`.
        others: of the same shape.

    Raises:
        DataError: shapes do not agree.
        NonFiniteError: a pixel is NaN or infinite.
    """
    left, right = _pair(images, others)
    return np.sqrt(((left - right) ** 2).reshape(len(left), -1).sum(1))


def ssim(images: Any, others: Any, *, span: float = 2.0, sigma: float = 1.5) -> np.ndarray:
    """Structural similarity of each pair, `[q]`, at most 1; Wang et al. (2004).

    With a Gaussian window of 7 pixels, and the mean over channels and the places where the window
    lies inside the image.

    Args:
        images: `[q, c, h, w]`, at least 7 pixels high and wide.
        others: of the same shape.
        span: from the darkest to the lightest possible value; 2 for images from -1 to 1.
        sigma: of the window.

    Raises:
        DataError: shapes do not agree, or images are smaller than the window.
        NonFiniteError: a pixel is NaN or infinite.
    """
    left, right = _pair(images, others)
    if min(left.shape[2:]) < WINDOW:
        raise DataError(
            f"images are {left.shape[2]} by {left.shape[3]} pixels and the window of ssim is "
            f"{WINDOW}: enlarge them, or use pixel_distance"
        )
    places = np.arange(WINDOW) - WINDOW // 2
    window = np.exp(-(places**2) / (2 * sigma**2))
    window = window / window.sum()
    mean, other = _blurred(left, window), _blurred(right, window)
    variance = _blurred(left**2, window) - mean**2
    variance_other = _blurred(right**2, window) - other**2
    covariance = _blurred(left * right, window) - mean * other
    first, second = (0.01 * span) ** 2, (0.03 * span) ** 2
    value = (2 * mean * other + first) * (2 * covariance + second)
    value /= (mean**2 + other**2 + first) * (variance + variance_other + second)
    return value.mean((1, 2, 3))


WINDOW = 7


def _blurred(images: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Weighted means over windows that lie inside the image."""
    for axis in (2, 3):
        views = np.lib.stride_tricks.sliding_window_view(images, WINDOW, axis)
        images = views @ window
    return images


def _pair(images: Any, others: Any) -> tuple[np.ndarray, np.ndarray]:
    left = numbers(images, "images", (None, None, None, None))
    return left, numbers(others, "others", left.shape)
