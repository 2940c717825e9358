"""Small pictures of examples, joined into one image so that the page stays light."""

import base64
import io
import math
from dataclasses import dataclass

import numpy as np

BUDGET = 1_100_000
"""Bytes of the joined picture above which its grey levels are reduced to sixteen."""


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """Many equal pictures in one, in reading order, each inside a margin of one pixel.

    Attributes:
        uri: the picture as a data URI.
        columns: tiles in a row.
        rows: rows of tiles.
        height: of a picture, in pixels, without its margin.
        width: of a picture, in pixels, without its margin.
        ink: whether the pictures are bright strokes on black, which a light page shows inverted.
    """

    uri: str
    columns: int
    rows: int
    height: int
    width: int
    ink: bool


def sprite(images: np.ndarray, *, budget: int = BUDGET) -> Sprite:
    """Join pictures into one PNG.

    Args:
        images: `[m, h, w]` grey or `[m, h, w, 3]` colour, uint8; the brightest value of grey
            pictures is stretched to white.
        budget: bytes above which grey levels are reduced.
    """
    count, height, width = images.shape[:3]
    grey = images.ndim == 3
    if grey:
        images = _stretch(images)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    # A browser that scales the sheet blends across edges, so each tile repeats its own outside.
    tiles = np.pad(images, [(0, 0), (1, 1), (1, 1), *[(0, 0)] * (images.ndim - 3)], mode="edge")
    filler = np.zeros((rows * columns - count, *tiles.shape[1:]), dtype=np.uint8)
    tiles = np.concatenate([tiles, filler])
    # [rows, columns, h, w, ...] -> [rows, h, columns, w, ...]
    sheet = tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2)
    sheet = sheet.reshape(rows * (height + 2), columns * (width + 2), *images.shape[3:])
    content = _png(sheet, levels=256)
    if grey and len(content) > budget:
        content = _png(sheet, levels=16)
    return Sprite(
        uri="data:image/png;base64," + base64.b64encode(content).decode(),
        columns=columns,
        rows=rows,
        height=height,
        width=width,
        ink=grey and _is_ink(images),
    )


def _stretch(images: np.ndarray) -> np.ndarray:
    brightest = int(images.max(initial=0))
    if brightest in (0, 255):
        return images.astype(np.uint8)
    return np.rint(images * (255 / brightest)).astype(np.uint8)


def _is_ink(images: np.ndarray) -> bool:
    border = np.concatenate(
        [
            images[:, 0].ravel(),
            images[:, -1].ravel(),
            images[:, :, 0].ravel(),
            images[:, :, -1].ravel(),
        ]
    )
    return bool(np.median(border) < 32)


def _png(sheet: np.ndarray, *, levels: int) -> bytes:
    from PIL import Image

    if levels < 256:
        picture = Image.fromarray((sheet // (256 // levels)).astype(np.uint8), mode="P")
        picture.putpalette([v for i in range(levels) for v in (i * 255 // (levels - 1),) * 3])
    else:
        picture = Image.fromarray(sheet)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True, **({"bits": 4} if levels == 16 else {}))
    return stream.getvalue()
