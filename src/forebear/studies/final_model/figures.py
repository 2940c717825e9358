"""Figures of the study of final-model methods."""

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

if TYPE_CHECKING:
    from forebear.studies.final_model import Outcome

DRAWN = {
    "unrolled": ("Trajectory derivative", "#332288"),
    "horizon": ("Matched: λ = 1/(ηT)", PALETTE[1]),
    "graddot": ("GradDot", PALETTE[0]),
    "datainf": ("DataInf", PALETTE[5]),
    "gn_100": ("GN, λ = 100 λ₀", PALETTE[2]),
    "ekfac_horizon": ("EK-FAC, matched", PALETTE[4]),
    "ekfac": ("EK-FAC", PALETTE[3]),
    "gradcos": ("GradCos", SOFT),
    "trak": ("TRAK", SOFT),
}
"""Lines of the first figure: those that tell the story. All others are in the tables."""

STANDS_FOR = {"horizon": "cg_horizon", "gn_100": "cg_100"}
"""What is drawn where no exact Gauss-Newton matrix is affordable; it solves the same system."""


def draw(outcome: "Outcome", out: Path, title: str) -> dict[str, str]:
    """Draw the figures; captions by name."""
    captions = {"agreement": _agreement(outcome, out, title)}
    if outcome.sweep is not None:
        captions["damping"] = _damping(outcome, out, title)
    return captions


def _agreement(outcome: "Outcome", out: Path, title: str) -> str:
    x = np.asarray(outcome.horizons)
    with figure(out, "agreement", (9.2, 5.6)) as axes:
        labels = []
        for key, (text, color) in DRAWN.items():
            key = key if key in outcome.values else STANDS_FOR.get(key, key)
            if key not in outcome.values:
                continue
            strong = key in ("horizon", "cg_horizon")
            weak = key in ("gradcos", "trak")
            mean, (low, high) = outcome.mean(key), outcome.interval(key).T
            style = {"linestyle": (0, (1, 1.2))} if weak else {}
            line(axes, x, mean, color, low=low, high=high, strong=strong, faint=weak, **style)
            labels.append(Label(text, float(mean[-1]), color, strong))
        if outcome.ceiling.min() < 0.99:
            axes.plot(x, outcome.ceiling, color=FAINT, linewidth=1.4, linestyle=(0, (5, 3)))
            labels.append(Label("noise ceiling", float(outcome.ceiling[-1]), SOFT))
        axes.axhline(0, color=FAINT, linewidth=1)
        logarithmic(axes, x)
        axes.set_xlim(x[0] * 0.94, x[-1] * 1.02)
        axes.set_ylim(min(-0.06, min(label.y for label in labels) - 0.06), 1.02)
        axes.set_yticks(np.arange(0, 1.01, 0.2))
        axes.set_xlabel("further training, ηT (learning rate × steps)")
        axes.set_ylabel("cosine with the real response")
        _titles(axes, "Which method foresees further training?", title, pad=24)
        label_ends(axes, x[-1], labels)
        _epochs_above(axes, outcome)
    return (
        "Cosine between each method's scores and the response of further training to leaving an "
        "example out, against the amount of further training; mean over queries, bands are 95 % "
        "bootstrap intervals. Numbers along the top are epochs."
    )


def _titles(axes: Any, title: str, task: str, pad: float = 12) -> None:
    axes.set_title(title, pad=pad)
    axes.set_title(task, loc="right", pad=pad, fontweight="normal", color=SOFT)


def _epochs_above(axes: Any, outcome: "Outcome") -> None:
    for horizon, epochs in zip(outcome.horizons, outcome.epochs, strict=True):
        unit = " epoch" if epochs == 1 else ""
        axes.annotate(
            f"{epochs}{unit}",
            (horizon, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=SOFT,
        )


def _damping(outcome: "Outcome", out: Path, title: str) -> str:
    from forebear.studies.final_model import SWEEP

    assert outcome.sweep is not None
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground="white")]
    shades = _shades(len(outcome.epochs))
    with figure(out, "damping", (8.6, 5.2)) as axes:
        for curve, horizon, epochs, color in zip(
            outcome.sweep, outcome.horizons, outcome.epochs, shades, strict=True
        ):
            line(axes, SWEEP, curve, color)
            matched = float(np.interp(np.log(1 / horizon), np.log(SWEEP), curve))
            axes.plot([1 / horizon], [matched], "o", color=color, markersize=8, zorder=5)
            best = int(curve.argmax())
            axes.plot([SWEEP[best]], [curve[best]], "|", color=INK, markersize=11, zorder=6)
            axes.annotate(
                str(epochs),
                (1 / horizon, matched),
                xytext=(0, -17),
                textcoords="offset points",
                ha="center",
                fontsize=10,
                color=color,
                fontweight="bold",
                zorder=7,
                path_effects=halo,
            )
        logarithmic(axes, [1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100])
        axes.set_ylim(-0.02, 1.04)
        axes.set_yticks(np.arange(0, 1.01, 0.2))
        axes.set_xlabel("damping λ of an exact Gauss-Newton solve")
        axes.set_ylabel("cosine with the real response")
        _titles(axes, "The best damping follows the horizon", title)
        axes.annotate(
            "●  λ = 1/(ηT), with epochs of further training      |  best λ",
            (0.5, 0.03),
            xycoords="axes fraction",
            fontsize=9.5,
            color=SOFT,
        )
    return (
        "Cosine with the real response against the damping, one curve for each amount of further "
        "training, with its number of epochs. Dots: the damping that the horizon foretells, "
        "λ = 1/(ηT). Strokes: the best of all dampings tried."
    )


def _shades(count: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.85 * k / max(1, count - 1))) for k in range(count)]
