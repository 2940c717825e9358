"""Figures of the Hessian study."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forebear.studies.figure import (
    FAINT,
    INK,
    PALETTE,
    SOFT,
    Label,
    figure,
    label_ends,
    line,
    logarithmic,
)
from forebear.studies.hessians.ladder import LADDER
from forebear.studies.hessians.tables import best_lds, curve, interval

if TYPE_CHECKING:
    from forebear.studies.hessians import Found

DRAWN = {
    "hessian": ("Hessian", INK, "-"),
    "ggn": ("Gauss-Newton", PALETTE[0], "-"),
    "block": ("GN by layers", PALETTE[5], "-"),
    "ekfac": ("EK-FAC", PALETTE[2], "-"),
    "kfac": ("K-FAC", PALETTE[1], (0, (4, 2))),
    "kfac_one": ("K-FAC, 1 target", PALETTE[4], (0, (1, 1.2))),
    "fisher": ("empirical Fisher", PALETTE[3], "-"),
    "identity": ("identity", SOFT, (0, (1, 1.2))),
}
"""Lines of the first figure; the other estimates are in the tables."""

BARS = ("hessian", "ggn", "block", "ekfac", "kfac", "fisher", "identity")

SHORT = {
    "exact": "exact",
    "1 target from the model": "1 target",
    "1 weighted target": "1 weighted",
    "training labels": "labels",
}


def draw(
    found: Sequence["Found"], dampings: Sequence[float], decay: float, out: Path
) -> dict[str, str]:
    """Draw the figures; captions by name."""
    return {
        "damping": _curves(found, dampings, decay, out),
        "ladder": _ladder(found, out),
        "shares": _shares(found, out),
    }


def _curves(found: Sequence["Found"], dampings: Sequence[float], decay: float, out: Path) -> str:
    x = np.asarray(dampings)
    with figure(out, "damping", (8.8, 5.4)) as axes:
        labels = []
        for name, (text, color, style) in DRAWN.items():
            each = curve(found, name)
            mean = each.mean(0)
            line(
                axes,
                x,
                mean,
                color,
                low=each.min(0),
                high=each.max(0),
                strong=name == "hessian",
                linestyle=style,
            )
            labels.append(Label(text, float(mean[-1]), color, name == "hessian"))
        low, high = axes.get_ylim()
        axes.axvline(decay, color=FAINT, linewidth=1.2, zorder=1)
        axes.text(decay * 1.06, low + 0.02 * (high - low), "weight decay", color=SOFT, fontsize=9)
        axes.set_ylim(low, high)
        logarithmic(
            axes, [tick for tick in (1e-4, 1e-3, 1e-2, 1e-1) if x[0] <= tick <= x[-1] * 1.01]
        )
        axes.set_xlim(x[0] * 0.92, x[-1] * 1.05)
        axes.set_xlabel("damping λ")
        axes.set_ylabel("LDS: rank correlation with retraining")
        axes.set_title("Better curvature predicts retraining better, each at its own damping")
        label_ends(axes, x[-1] * 1.02, labels)
    return (
        "LDS against the damping of each curvature, mean over queries and seeds; bands span the "
        "seeds. Kronecker factors are exact expectations unless the line says otherwise."
    )


def _ladder(found: Sequence["Found"], out: Path) -> str:
    with figure(out, "ladder", (9.6, 4.6), panels=2, gridspec_kw={"width_ratios": (3, 2)}) as both:
        left, right = both
        names = [name for name in BARS if name in found[0].warm]
        heights = np.array([best_lds(found, name).mean() for name in names])
        spans = np.array([interval(found, name) for name in names]).T
        colors = [DRAWN[name][1] for name in names]
        places = np.arange(len(names))
        left.bar(places, heights, color=colors, width=0.66, zorder=2, alpha=0.92)
        low, high = np.maximum(heights - spans[0], 0), np.maximum(spans[1] - heights, 0)
        whiskers = {"fmt": "none", "ecolor": INK, "elinewidth": 1.1, "capsize": 3, "zorder": 4}
        left.errorbar(places, heights, [low, high], **whiskers)
        for place, height, top in zip(places, heights, spans[1], strict=True):
            left.text(place, max(height, top) + 0.015, f"{height:.2f}", ha="center", fontsize=9.5)
        left.set_xticks(places, [_wrapped(DRAWN[name][0]) for name in names], fontsize=9)
        left.set_ylim(0, max(heights.max(), spans[1].max()) * 1.14)
        left.set_ylabel("LDS at the best damping")
        left.set_title("How well each predicts")
        left.grid(axis="x", visible=False)
        _steps(right, found)
    return (
        "Left: LDS at the best damping, mean over seeds, with 95 % bootstrap intervals over "
        "subsets. Right: how far each rung of the ladder is from the one above it, Frobenius norm "
        "relative to that."
    )


def _steps(axes: Any, found: Sequence["Found"]) -> None:
    names = list(LADDER)[1:]
    values = np.array([[one.steps[name][0] for name in names] for one in found])
    places = np.arange(len(names))[::-1]
    colors = [DRAWN[name][1] for name in names]
    axes.barh(places, values.mean(0), color=colors, height=0.58, zorder=2, alpha=0.92)
    for place, value in zip(places, values.mean(0), strict=True):
        axes.text(value + 0.008, place, f"{value:.2f}", va="center", fontsize=9.5)
    steps = ["Hessian →\nGauss-Newton", "→ by layers", "→ EK-FAC", "→ K-FAC"]
    axes.set_yticks(places, steps, fontsize=9)
    axes.set_xlim(0, values.mean(0).max() * 1.2)
    axes.set_xlabel("relative residual of the step")
    axes.set_title("How much each step leaves out")
    axes.grid(axis="y", visible=False)


def _shares(found: Sequence["Found"], out: Path) -> str:
    titles = list(dict.fromkeys(share.title for share in found[0].shares))
    ways = list(dict.fromkeys(share.way for share in found[0].shares))
    width = 0.8 / len(ways)
    with figure(out, "shares", (8.8, 4.4)) as axes:
        for i, way in enumerate(ways):
            each = np.array(
                [
                    [
                        next(s.share for s in one.shares if (s.title, s.way) == (title, way))
                        for title in titles
                    ]
                    for one in found
                ]
            )
            mean = each.mean(0)
            places = np.arange(len(titles)) + (i - (len(ways) - 1) / 2) * width
            axes.bar(places, mean, width * 0.9, color=PALETTE[i], label=SHORT[way], zorder=2)
            span = [mean - each.min(0), each.max(0) - mean]
            axes.errorbar(places, mean, span, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
            for place, value, top in zip(places, mean, each.max(0), strict=True):
                axes.text(place, top + 0.02, f"{value:.2f}", ha="center", fontsize=8.5)
        axes.axhline(0.5, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.set_xticks(np.arange(len(titles)), [_network(title) for title in titles])
        axes.set_ylim(0, 1.28)
        axes.set_yticks(np.arange(0, 1.01, 0.25))
        axes.set_ylabel("eigenvalue share of K-FAC's squared error")
        axes.set_title("Are K-FAC's eigenvalues to blame? It depends on the factors")
        legend = {"frameon": False, "loc": "upper left", "ncols": len(ways), "fontsize": 9}
        axes.legend(title="factors from", **legend)
        axes.grid(axis="x", visible=False)
    return (
        "Share of K-FAC's squared error that better eigenvalues repair, by network and by how the "
        "Kronecker factors are estimated; the rest is due to the basis. Bars are means over seeds, "
        "whiskers span them. Above the dashed line eigenvalues are most of the error."
    )


def _wrapped(text: str) -> str:
    return text.replace(" ", "\n").replace("Gauss-Newton", "Gauss-\nNewton")


def _network(title: str) -> str:
    widths, activation = title.rsplit(" ", 1)
    sizes = widths.split("-")
    hidden = sizes[1:-1]
    if len(hidden) > 2 and len(set(hidden)) == 1:
        widths = f"{sizes[0]}-{hidden[0]}×{len(hidden)}-{sizes[-1]}"
    return f"{widths} {activation}"
