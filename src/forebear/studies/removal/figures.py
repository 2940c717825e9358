"""The figures of the removal study."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forebear.studies.figure import INK, PALETTE, SOFT, figure
from forebear.studies.removal.experiments import Cell

NAMES = {
    "influence": "influence",
    "rescaled": "rescaled",
    "rescaled_n": "rescaled, n",
    "rescaled_d": "rescaled, d",
    "newton_step": "Newton step",
    "newton_step_2": "second order",
}
COLORS = dict(zip(NAMES, (PALETTE[1], PALETTE[4], PALETTE[3], PALETTE[3], PALETTE[0], PALETTE[2]),
                  strict=True))  # fmt: skip
SHADES = ("#9ecae1", "#4292c6", "#08306b")
MARKERS = ("o", "s", "^")


def draw_laws(
    folder: Path, cells: Sequence[Cell], exponents: dict[str, np.ndarray], ladder: Sequence[Cell]
) -> None:
    """Errors against the predicted laws, and their orders in n."""
    with figure(folder, "removal-laws", (13.5, 4.6), panels=3) as (left, middle, right):
        law = [c.k * c.d / c.n**2 for c in cells]
        errors = [c.errors["newton_step"].mean() for c in cells]
        _against_law(left, cells, law, errors)
        a, b = exponents["newton_step"]
        left.set(
            title="Newton step: error",
            xlabel="k d / n²",
            ylabel="distance to the exact refit",
        )
        _corner(left, f"fitted: $n^{{{a:.2f}}}\\,(kd)^{{{b:.2f}}}$")
        law = [(c.k + c.d) * (c.k * c.d) ** 0.5 / c.n**2 for c in cells]
        gaps = [c.gaps["influence"].mean() for c in cells]
        _against_law(middle, cells, law, gaps, legend=False)
        a, b, c = exponents["influence"]
        middle.set(
            title="Influence: gap to the Newton step",
            xlabel="(k + d) √(kd) / n²",
            ylabel="distance to the Newton step",
        )
        _corner(middle, f"fitted: $n^{{{a:.2f}}}\\,(kd)^{{{b:.2f}}}\\,(k+d)^{{{c:.2f}}}$")
        _ladder(right, ladder)


def draw_sizes(folder: Path, cells: Sequence[Cell]) -> None:
    """Relative errors of every estimator as more is removed."""
    with figure(folder, "removal-sizes", (8.4, 5.0)) as axes:
        ks = np.array([c.k for c in cells])
        ends = {}
        for name, label in NAMES.items():
            if name == "rescaled_d":  # the same as rescaled_n without a penalty
                continue
            values = np.array([(c.errors[name] / c.size).mean() for c in cells])
            strong = name == "newton_step"
            axes.loglog(
                ks, values, color=COLORS[name], marker="o", markersize=4.5,
                linewidth=3 if strong else 1.8, zorder=4 if strong else 3,
            )  # fmt: skip
            ends[label] = (values[-1], COLORS[name])
        cell = cells[0]
        axes.axvline(cell.d, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            f"k = d = {cell.d}", (cell.d, axes.get_ylim()[0]), xytext=(6, 8),
            textcoords="offset points", color=SOFT, fontsize=9,
        )  # fmt: skip
        axes.set(
            title=f"Error of the parameters after removing k of {cell.n:,} examples",
            xlabel="removed examples k",
            ylabel="error relative to the shift",
        )
        axes.set_xlim(ks[0] * 0.85, ks[-1] * 3.2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.set_xticks([], minor=True)
        _label_ends(axes, float(ks[-1]), ends)


def _against_law(
    axes: Any,
    cells: Sequence[Cell],
    law: Sequence[float],
    values: Sequence[float],
    *,
    legend: bool = True,
) -> None:
    sizes = sorted({c.n for c in cells})
    dimensions = sorted({c.d for c in cells})
    for i, d in enumerate(dimensions):
        for j, n in enumerate(sizes):
            chosen = [m for m, c in enumerate(cells) if c.n == n and c.d == d]
            axes.loglog(
                [law[m] for m in chosen], [values[m] for m in chosen], MARKERS[i % 3],
                color=SHADES[j % 3], markersize=6, markeredgecolor="white", markeredgewidth=0.6,
            )  # fmt: skip
    ratio = float(np.exp(np.mean(np.log(np.array(values) / np.array(law)))))
    ends = np.array([min(law), max(law)])
    axes.plot(ends, ratio * ends, color=INK, linewidth=1.1, zorder=1)
    axes.annotate(
        f"law × {ratio:.1f}", (ends[1], ratio * ends[1]), xytext=(-6, 8),
        textcoords="offset points", ha="right", fontsize=9, color=INK,
    )  # fmt: skip
    if legend:
        from matplotlib.lines import Line2D

        shapes = [
            Line2D([], [], marker=MARKERS[i % 3], color=SOFT, linestyle="", label=f"d = {d}")
            for i, d in enumerate(dimensions)
        ]
        shades = [
            Line2D([], [], marker="o", color=SHADES[j % 3], linestyle="", label=f"n = {n:,}")
            for j, n in enumerate(sizes)
        ]
        axes.legend(
            handles=shapes + shades, frameon=False, fontsize=8.5, loc="upper left", ncols=2,
            handletextpad=0.1, columnspacing=0.8, borderpad=0,
        )  # fmt: skip


def _ladder(axes: Any, cells: Sequence[Cell]) -> None:
    sizes = np.array([c.n for c in cells], dtype=float)
    lines = {
        "shift": (np.array([c.size.mean() for c in cells]), SOFT),
        "influence": (np.array([c.errors["influence"].mean() for c in cells]), PALETTE[1]),
        "Newton step": (np.array([c.errors["newton_step"].mean() for c in cells]), PALETTE[0]),
        "second order": (np.array([c.errors["newton_step_2"].mean() for c in cells]), PALETTE[2]),
    }
    ends = {}
    for name, (values, color) in lines.items():
        slope = np.polyfit(np.log(sizes), np.log(values), 1)[0]
        axes.loglog(sizes, values, color=color, marker="o", markersize=4.5)
        ends[f"{name}\nslope {_minus(slope)}"] = (values[-1], color)
    axes.set(title="Orders in n", xlabel="examples n", ylabel="size of shift and errors")
    axes.set_xlim(sizes[0] * 0.85, sizes[-1] * 4.5)
    axes.set_xticks(sizes, [f"{int(n):,}" for n in sizes])
    axes.set_xticks([], minor=True)
    axes.tick_params(axis="x", labelsize=8.5)
    _label_ends(axes, sizes[-1], ends, apart=0.11)


def _minus(number: float) -> str:
    return f"{number:.2f}".replace("-", "−")


def _corner(axes: Any, text: str) -> None:
    axes.annotate(text, (0.98, 0.04), xycoords="axes fraction", ha="right", fontsize=9.5, color=INK)


def _label_ends(
    axes: Any, x: float, ends: dict[str, tuple[float, str]], *, apart: float = 0.055
) -> None:
    """Words at the ends of lines on a logarithmic axis, moved apart by a share of its height."""
    low, high = np.log10(axes.get_ylim())
    last = -np.inf
    for text, (y, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        place = max((np.log10(y) - low) / (high - low), last + apart)
        last = place
        axes.annotate(
            text, (x, 10 ** (low + place * (high - low))), xytext=(8, 0),
            textcoords="offset points", va="center", fontsize=9.5, color=color,
            annotation_clip=False,
        )  # fmt: skip
