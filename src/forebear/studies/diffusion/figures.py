"""Figures of the study of diffusion models."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from forebear.studies.diffusion.entrants import FIXED
from forebear.studies.diffusion.removal import strongest
from forebear.studies.diffusion.tables import label
from forebear.studies.figure import FAINT, INK, PALETTE, SOFT, figure

if TYPE_CHECKING:
    from forebear.studies.diffusion import Measured

SHOWN = ("das", "dtrak", "trak", "mucs", "abu", "nda", "pixels", "embedding")
"""Entrants whose strongest images are shown, the first four that are there."""

QUERIES, TOP = 5, 5


def draw(measured: "Measured", out: Path) -> dict[str, str]:
    """Draw the figures; captions by name."""
    return {
        "lds": _lds(measured, out),
        "strongest": _strongest(measured, out),
        "removed": _removed(measured, out),
    }


def _lds(measured: "Measured", out: Path) -> str:
    groups = list(measured.trained.subject.groups)
    keys = [key for key in measured.judged if key != "datamodel"]
    keys.sort(key=lambda key: measured.fixed(key, next(iter(measured.judged[key]))).mean)
    height = 1.6 + 0.3 * len(keys)
    with figure(out, "lds", (9.2, height), panels=len(groups), sharey=True) as panels:
        for axes, name, color in zip(panels, groups, PALETTE, strict=False):
            for y, key in enumerate(keys):
                if name in measured.judged[key]:
                    _bar(axes, y, measured, key, name, color)
            top = measured.ceilings[name][1]
            if not np.isnan(top):
                axes.axvline(top, color=FAINT, linewidth=1.4, linestyle=(0, (5, 3)))
            axes.axvline(0, color=FAINT, linewidth=1)
            axes.set_yticks(range(len(keys)), [label(key) for key in keys])
            axes.grid(axis="y", visible=False)
            axes.set_xlabel("LDS")
            axes.set_title(f"{name} images")
    return (
        "LDS of every method, mean over queries with 95 % intervals from a bootstrap over subsets; "
        "open circles: with the ridge that the ground truth would choose. Dashed: noise ceiling."
    )


def _bar(axes: Any, y: int, measured: "Measured", key: str, name: str, color: str) -> None:
    judged = measured.fixed(key, name)
    axes.errorbar(
        [judged.mean], [y], xerr=[1.96 * judged.error], fmt="o", color=color, markersize=6
    )
    if len(measured.judged[key][name]) > 1:
        axes.plot([measured.best(key, name).mean], [y], "o", color=color, markerfacecolor="none")


def _strongest(measured: "Measured", out: Path) -> str:
    subject = measured.trained.subject
    group = subject.groups["generated"]
    keys = [key for key in SHOWN if key in measured.scores][:4]
    image = subject.train.batch(slice(None))["image"]
    count = min(QUERIES, subject.few, subject.generated)
    columns, widths = 1 + len(keys), [1, *[TOP] * len(keys)]
    size = (10.5, 0.5 * count + 0.5)
    with figure(out, "strongest", size, panels=columns, width_ratios=widths) as panels:
        _grid(panels[0], measured.trained.generated[:count, None], "generated")
        for axes, key in zip(panels[1:], keys, strict=True):
            values, rows = measured.scores[key], measured.rows[key]
            fixed = values[FIXED] if len(values) > 1 else values[0]
            places = ((rows >= group.start) & (rows < group.stop)).nonzero()[:count, 0]
            _grid(axes, image[strongest(fixed[places], TOP)], label(key))
    return "Generated images, and the training images that count most for each by each method."


def _removed(measured: "Measured", out: Path) -> str:
    """Targets made again, for the method that moves them most."""
    removals = next(iter(measured.removals.values()))
    key = max(removals.pooled, key=lambda key: removals.pooled_shift(key).ratio)
    count = min(2 * QUERIES, removals.pictures[key].shape[1])
    titles = ("generated", f"without {label(key)}'s strongest", "without random images")
    with figure(out, "removed", (9.2, 0.6 * count / _columns(count) + 0.6), panels=3) as panels:
        for axes, images, title in zip(panels, removals.pictures[key], titles, strict=True):
            _grid(axes, images[:count].unflatten(0, (-1, _columns(count))), title)
    size = int(removals.pooled[key].removed)
    return (
        f"The same start noise under three models: trained on everything, without the {size} "
        f"images that {label(key)} holds strongest for these targets, and without as many "
        "random ones."
    )


def _columns(count: int) -> int:
    """Images side by side: the largest divisor of the count up to five."""
    return next(columns for columns in range(QUERIES, 0, -1) if count % columns == 0)


def _grid(axes: Any, images: Tensor, title: str) -> None:
    """Images `[rows, columns, 1, h, w]` side by side, with a margin between rows."""
    rows, columns, _, height, width = images.shape
    canvas = np.full((rows * (height + 1), columns * (width + 1)), np.nan)
    for r in range(rows):
        for c in range(columns):
            y, x = r * (height + 1), c * (width + 1)
            canvas[y : y + height, x : x + width] = images[r, c, 0].numpy()
    axes.imshow(canvas, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9.5, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(SOFT)
        spine.set_visible(False)
