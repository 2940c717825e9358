"""Likeness of images, and shifts after removals."""

import numpy as np
import pytest
from scipy import ndimage

from forebear.errors import DataError
from forebear.metrics import pixel_distance, removal_shift, ssim


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    images = generator.uniform(-1, 1, size=(4, 2, 11, 9))
    return images, np.clip(images + generator.normal(scale=0.3, size=images.shape), -1, 1)


def test_ssim_is_the_formula_with_scipys_gaussian(pair: tuple[np.ndarray, np.ndarray]) -> None:
    def blur(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, 1.5, truncate=2.0)[3:-3, 3:-3]

    expected = []
    for a, b in zip(*pair, strict=True):
        channels = []
        for x, y in zip(a, b, strict=True):
            mx, my = blur(x), blur(y)
            vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
            top = (2 * mx * my + 0.02**2) * (2 * cov + 0.06**2)
            channels.append((top / ((mx**2 + my**2 + 0.02**2) * (vx + vy + 0.06**2))).mean())
        expected.append(np.mean(channels))
    np.testing.assert_allclose(ssim(*pair), expected, rtol=1e-10)


def test_an_image_is_like_itself_and_less_like_a_noisier_one(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    images, noisy = pair
    np.testing.assert_allclose(ssim(images, images), 1)
    assert (pixel_distance(images, images) == 0).all()
    assert (ssim(images, noisy) < 1).all()
    np.testing.assert_allclose(ssim(images, noisy), ssim(noisy, images))
    expected = [np.linalg.norm((a - b).ravel()) for a, b in zip(images, noisy, strict=True)]
    np.testing.assert_allclose(pixel_distance(images, noisy), expected)


def test_small_images_are_refused() -> None:
    with pytest.raises(DataError, match="5 by 9 pixels"):
        ssim(np.zeros((1, 1, 5, 9)), np.zeros((1, 1, 5, 9)))
    with pytest.raises(DataError, match="others has shape"):
        pixel_distance(np.zeros((1, 1, 5, 9)), np.zeros((2, 1, 5, 9)))


def test_shifts_are_told_from_chance() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(1.0, 0.1, 60)
    shift = removal_shift(base[:20] + 0.5, base)
    assert shift.p < 1e-6
    assert shift.auc > 0.95
    assert shift.ratio == pytest.approx(1.5, rel=0.1)
    same = removal_shift(generator.normal(1.0, 0.1, 60), base)
    assert same.p > 0.01
    wins = np.mean([[a > b for b in base[:5]] for a in base[20:26]])
    assert removal_shift(base[20:26], base[:5]).auc == pytest.approx(wins)
    with pytest.raises(DataError, match="0 changes"):
        removal_shift([], base)
