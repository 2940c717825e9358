"""The look that all figures of studies share: few colours, labels on the lines, bands."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forebear.errors import MissingDependencyError

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000", "#332288")
"""Told apart by people who do not see all colours (after Okabe & Ito), strongest first."""

INK, SOFT, FAINT = "#1d1b18", "#5f5a52", "#c9c4b9"
"""For words, for axes and the less important, and for grids and backgrounds."""

STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10.5,
    "text.color": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelsize": 10.5,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ebe8e2",
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.minor.visible": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "path",
    "svg.hashsalt": "forebear",
}


@dataclass(frozen=True)
class Label:
    """Words at the end of a line.

    Attributes:
        text: what they say.
        y: where the line ends, in data coordinates.
        color: of the line.
        bold: for the line that matters.
    """

    text: str
    y: float
    color: str
    bold: bool = False


@contextmanager
def figure(
    folder: Path, name: str, size: tuple[float, float] = (8.0, 5.0), *, panels: int = 1, **more: Any
) -> Iterator[Any]:
    """Axes to draw on; written as `<name>.png` and `<name>.svg` at the end of the block.

    Args:
        folder: where to write.
        name: of both files, without ending.
        size: width and height in inches.
        panels: side by side; a list of axes is given for more than one.
        more: for `matplotlib.figure.Figure.subplots`, such as `sharey=True`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "figures of studies need matplotlib: pip install 'forebear[study]'"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    settings: Any = _known(matplotlib.rcParams)
    with matplotlib.rc_context(settings):
        drawn = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(drawn)
        axes = drawn.subplots(1, panels, **more)
        yield list(axes) if panels > 1 else axes
        drawn.savefig(folder / f"{name}.png")
        drawn.savefig(folder / f"{name}.svg", metadata={"Date": None})


def line(
    axes: Any,
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    color: str,
    *,
    low: Sequence[float] | np.ndarray | None = None,
    high: Sequence[float] | np.ndarray | None = None,
    strong: bool = False,
    faint: bool = False,
    **more: Any,
) -> None:
    """A line with its interval as a band; `strong` for the one that matters, `faint` if least."""
    width = 3.2 if strong else 1.7
    axes.plot(x, y, color=color, linewidth=width, zorder=3 + strong, **more)
    if low is not None and high is not None:
        alpha = 0.2 if strong else 0.05 if faint else 0.1
        axes.fill_between(x, low, high, color=color, alpha=alpha, linewidth=0, zorder=2)


def logarithmic(axes: Any, ticks: Sequence[float] | np.ndarray, *, which: str = "x") -> None:
    """A logarithmic axis with plain numbers at `ticks`."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def label_ends(axes: Any, x: float, labels: Sequence[Label], *, size: float = 9.5) -> None:
    """Write labels to the right of `x`, moved apart so that none covers another.

    Call it when the limits of the axes are final; the y axis must be linear.
    """
    if not labels:
        return
    low, high = axes.get_ylim()
    height = axes.get_figure().get_size_inches()[1] * 72 * 0.78
    apart = (high - low) * 1.3 * size / height
    order = sorted(labels, key=lambda label: label.y)
    places = _spread(np.array([label.y for label in order]), apart, low, high)
    for label, place in zip(order, places, strict=True):
        axes.annotate(
            label.text,
            xy=(x, label.y),
            xytext=(14, (place - label.y) / (high - low) * height),
            textcoords="offset points",
            va="center",
            fontsize=size,
            fontweight="bold" if label.bold else "normal",
            color=label.color,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": label.color,
                "linewidth": 0.6,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 2,
            },
        )


def _spread(wanted: np.ndarray, apart: float, low: float, high: float) -> np.ndarray:
    """The nearest places to `wanted` (ascending) that are at least `apart`, inside the limits."""
    # Isotonic regression of the places without their gaps (pool adjacent violators).
    gaps = apart * np.arange(len(wanted))
    blocks: list[list[float]] = []
    for value in wanted - gaps:
        blocks.append([float(value), 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            value_b, count_b = blocks.pop()
            value_a, count_a = blocks.pop()
            count = count_a + count_b
            blocks.append([(value_a * count_a + value_b * count_b) / count, count])
    level = np.concatenate([np.full(int(count), value) for value, count in blocks])
    top = max(low, high - gaps[-1])
    return np.clip(level, low, top) + gaps


def _known(settings: Any) -> dict[str, Any]:
    """Our style, without fonts that would only make matplotlib complain."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [name for name in STYLE["font.sans-serif"] if name in installed]
    return {k: v for k, v in STYLE.items() if k in settings} | {"font.sans-serif": fonts}


def require_figures() -> None:
    """Raise before hours of work rather than after them.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise MissingDependencyError(
            "figures of studies need matplotlib: pip install 'forebear[study]'"
        )
