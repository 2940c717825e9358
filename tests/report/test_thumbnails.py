import base64
import io

import numpy as np
import pytest
from PIL import Image

from forebear.report.thumbnails import Sprite, sprite


def tile(made: Sprite, index: int) -> np.ndarray:
    content = base64.b64decode(made.uri.removeprefix("data:image/png;base64,"))
    sheet = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    top = index // made.columns * (made.height + 2) + 1
    left = index % made.columns * (made.width + 2) + 1
    return sheet[top : top + made.height, left : left + made.width]


@pytest.mark.parametrize("count", [1, 2, 5, 9, 10])
def test_every_picture_is_found_at_its_place(count: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, 5, 7), dtype=np.uint8)
    images[0, 0, 0] = 255
    made = sprite(images)
    assert made.columns * made.rows >= count
    for i in range(count):
        assert np.array_equal(tile(made, i)[..., 0], images[i])


def test_colour_pictures_keep_their_colours() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    made = sprite(images)
    assert np.array_equal(tile(made, 2), images[2])
    assert not made.ink


def test_dim_pictures_are_stretched_to_white() -> None:
    images = np.array([[[0, 8], [16, 4]]], dtype=np.uint8)
    assert tile(sprite(images), 0)[..., 0].tolist() == [[0, 128], [255, 64]]


def test_a_heavy_sheet_loses_grey_levels_and_weight_but_not_its_order() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    images[0, 0, 0] = 255
    full, light = sprite(images), sprite(images, budget=1000)
    assert len(light.uri) < 0.6 * len(full.uri)
    for i in (0, 49):
        assert np.abs(tile(light, i)[..., 0].astype(int) - images[i]).max() <= 16
    assert len(np.unique(tile(light, 1))) == 16


def test_bright_strokes_on_black_are_ink() -> None:
    stroke = np.zeros((1, 8, 8), dtype=np.uint8)
    stroke[:, 2:6, 3:5] = 255
    assert sprite(stroke).ink
    assert not sprite(255 - stroke).ink
