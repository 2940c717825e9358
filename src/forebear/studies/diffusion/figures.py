"""Figures of the study of diffusion models."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from forebear.studies.diffusion.entrants import FIXED
from forebear.studies.diffusion.removal import strongest
from forebear.studies.diffusion.tables import SIMPLE, label
from forebear.studies.figure import FAINT, INK, PALETTE, SOFT, figure

if TYPE_CHECKING:
    from forebear.studies.diffusion import Measured

SHOWN = ("das", "mucs", "abu", "trak", "nda", "pixels", "dtrak", "embedding")
"""Entrants whose strongest images are shown, the first of them that are there."""

METHODS, QUERIES, TOP = 4, 6, 4

AGAIN = {"targets": 10, "controls": 6}
"""Images that are shown made again, of either kind."""

CELL, GAP, MARGIN, SIDE = 0.42, 1.1, 0.05, 4.6
"""Inches of an image in a figure; in units of that: between blocks, around images, and for words
beside them."""

LARGE, NEAR, CLASS = 0.66, 0.5, 1.9
"""The same, where images are to be recognised: inches, between blocks, and for a class."""

NAMES = {"validation": "held-out images", "generated": "generated images"}


def draw(measured: "Measured", out: Path) -> dict[str, str]:
    """Draw the figures; captions by name."""
    return {
        "lds": _lds(measured, out),
        "strongest": _strongest(measured, out),
        "removed": _removed(measured, out),
    }


def _lds(measured: "Measured", out: Path) -> str:
    groups = list(measured.trained.subject.groups)
    keys = [key for key in measured.judged if _is_main(key)]
    keys.sort(key=lambda key: _mean(measured, key))
    with figure(out, "lds", (8.6, 1.5 + 0.29 * len(keys))) as axes:
        for place, (name, color) in enumerate(zip(groups, PALETTE, strict=False)):
            for y, key in enumerate(keys):
                if name in measured.judged[key]:
                    _dot(axes, y + 0.13 - 0.26 * place, measured, key, name, color)
            top = measured.ceilings[name][1]
            if not np.isnan(top):
                axes.axvline(top, color=color, linewidth=1.2, linestyle=(0, (4, 3)), alpha=0.55)
            axes.plot([], [], "o", color=color, label=NAMES.get(name, name))
        axes.axvline(0, color=FAINT, linewidth=1)
        axes.set_ylim(-0.6, len(keys) - 0.1)
        axes.set_xlim(right=1.0)
        axes.set_yticks(range(len(keys)), [label(key) for key in keys])
        for tick, key in zip(axes.get_yticklabels(), keys, strict=True):
            tick.set_color(SOFT if key in SIMPLE else INK)
            tick.set_fontstyle("italic" if key in SIMPLE else "normal")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("LDS: rank correlation with the losses of retrained networks")
        axes.set_title("Which scores foretell the loss of an image?", pad=24)
        about = measured.trained.subject.title
        axes.text(0, 1.01, about, transform=axes.transAxes, va="bottom", color=SOFT, fontsize=10)
        axes.legend(loc="lower right", facecolor="white", edgecolor="none", framealpha=1)
    return (
        "LDS of every method, mean over queries with 95 % intervals from a bootstrap over subsets; "
        "open circles: with the ridge that the ground truth would choose. Dashed: noise ceilings. "
        "In italics: likeness of images, which needs no diffusion model."
    )


def _is_main(key: str) -> bool:
    """Not the oracle, nor what only takes a method apart."""
    return key != "datamodel" and not key.endswith(":rank") and not key.startswith("mucs_")


def _mean(measured: "Measured", key: str) -> float:
    return float(np.mean([measured.fixed(key, name).mean for name in measured.judged[key]]))


def _dot(axes: Any, y: float, measured: "Measured", key: str, name: str, color: str) -> None:
    judged = measured.fixed(key, name)
    half = 1.96 * judged.error
    axes.plot([judged.mean - half, judged.mean + half], [y, y], color=color, linewidth=1.6)
    axes.plot([judged.mean], [y], "o", color=color, markersize=5.5)
    if len(measured.judged[key][name]) > 1:
        best = measured.best(key, name).mean
        axes.plot([best], [y], "o", color=color, markerfacecolor="white", markersize=5.5, zorder=1)


def _strongest(measured: "Measured", out: Path) -> str:
    subject = measured.trained.subject
    group = subject.groups["generated"]
    keys = [key for key in SHOWN if key in measured.scores][:METHODS]
    image = subject.train.batch(slice(None))["image"]
    count = min(QUERIES, subject.few, subject.generated)
    blocks = [("generated", measured.trained.generated[:count, None])]
    for key in keys:
        values, rows = measured.scores[key], measured.rows[key]
        fixed = values[FIXED] if len(values) > 1 else values[0]
        places = ((rows >= group.start) & (rows < group.stop)).nonzero()[:count, 0]
        blocks.append((label(key), image[strongest(fixed[places], TOP)]))
    told = subject.condition()
    sides = () if told is None else tuple(subject.pictures.classes[int(i)] for i in told[:count])
    _mosaic(out, "strongest", blocks, sides=sides, size=(LARGE, NEAR, CLASS), smooth=True)
    return "Generated images, and the training images that count most for each by each method."


def _removed(measured: "Measured", out: Path) -> str:
    """Images made again, for the method that moves the targets most."""
    removals = next(iter(measured.removals.values()))
    key = max(removals.pooled, key=lambda key: removals.pooled_shift(key).ratio)
    size = int(removals.pooled[key].removed)
    pictures, targets = removals.pictures[key], measured.trained.subject.removal.targets
    blocks = [
        ("targets", pictures[:, :targets][:, : AGAIN["targets"]]),
        ("controls", pictures[:, targets:][:, : AGAIN["controls"]]),
    ]
    sides = ("trained on everything", f"without the {size} strongest\nby {label(key)}")
    _mosaic(out, "removed", blocks, sides=(*sides, f"without {size}\nrandom images"))
    return (
        f"The same start noise under three models: trained on everything, without the {size} "
        f"images that {label(key)} holds strongest for all the targets, and without as many "
        "random ones."
    )


def _mosaic(
    out: Path,
    name: str,
    blocks: list[tuple[str, Tensor]],
    *,
    sides: tuple[str, ...] = (),
    size: tuple[float, float, float] = (CELL, GAP, SIDE),
    smooth: bool = False,
) -> None:
    """Blocks of images `[rows, columns, 1, h, w]` side by side, all images of one size.

    Args:
        out: folder of the figure.
        name: of the figure.
        blocks: a title and images each, with as many rows each.
        sides: words beside the rows.
        size: inches of an image; gaps and words beside, in units of that.
        smooth: images without visible pixels.
    """
    cell, gap, side = size
    rows = blocks[0][1].shape[0]
    widths = [images.shape[1] for _, images in blocks]
    starts = np.cumsum([0, *(width + gap for width in widths[:-1])])
    # Everything is inside the axes, in units of an image, so that nothing is cut off.
    left, right, top = -side if sides else -0.1, starts[-1] + widths[-1] + 0.1, -0.85
    with figure(out, name, (cell * (right - left), cell * (rows + 0.1 - top))) as axes:
        for start, (title, images) in zip(starts, blocks, strict=True):
            axes.text(start + MARGIN, -0.1, title, fontsize=9, fontweight="bold", va="bottom")
            for row, column in np.ndindex(*images.shape[:2]):
                _image(axes, images[row, column, 0], start + column, row, smooth)
        for row, text in enumerate(sides):
            axes.text(-0.3, row + 0.5, text, ha="right", va="center", fontsize=9.5, color=SOFT)
        axes.set_xlim(left, right)
        axes.set_ylim(rows + 0.1, top)
        axes.set_aspect("equal")
        axes.axis("off")


def _image(axes: Any, image: Tensor, x: float, y: float, smooth: bool) -> None:
    """Draw `[h, w]` in the unit square at x and y."""
    place = (x + MARGIN, x + 1 - MARGIN, y + 1 - MARGIN, y + MARGIN)
    axes.imshow(
        image.clamp(-1, 1).numpy(),
        extent=place,
        cmap="gray_r",
        vmin=-1,
        vmax=1,
        interpolation="bicubic" if smooth else "nearest",
    )
    # Light images need an edge to be seen as images.
    axes.plot(
        [place[0], place[1], place[1], place[0], place[0]],
        [place[2], place[2], place[3], place[3], place[2]],
        color=FAINT,
        linewidth=0.5,
    )
