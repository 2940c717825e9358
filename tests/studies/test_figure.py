from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from forebear.studies import figure as figures
from forebear.studies.figure import Label, figure, label_ends, line, logarithmic


def test_a_figure_is_written_as_png_and_svg(tmp_path: Path) -> None:
    with figure(tmp_path / "new", "plot") as axes:
        line(axes, [1, 2, 4], [0.1, 0.2, 0.3], figures.PALETTE[0], low=[0] * 3, high=[1] * 3)
        logarithmic(axes, [1, 2, 4])
        label_ends(axes, 4, [Label("one", 0.3, figures.PALETTE[0])])
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "new" / "plot.svg").read_text().startswith("<?xml")


def test_the_style_does_not_leak(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with figure(tmp_path, "plot", panels=2) as (left, _):
        line(left, [0, 1], [0, 1], "black", strong=True)
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    from forebear.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match="pip install 'forebear"), figure(tmp_path, ""):
        pass


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.floats(0.01, 0.1))
def test_labels_keep_their_order_and_distance(values: list[float], apart: float) -> None:
    wanted = np.sort(values)
    places = figures._spread(wanted, apart, 0.0, 1.0)
    assert (np.diff(places) >= apart - 1e-9).all()
    assert places.min() >= -1e-9
    assert places.max() <= 1 + 1e-9


def test_labels_move_as_little_as_possible() -> None:
    wanted, apart = np.array([0.30, 0.31, 0.33, 0.70, 0.71]), 0.05
    constraints = [
        {"type": "ineq", "fun": lambda x, k=k: x[k + 1] - x[k] - apart} for k in range(4)
    ]
    best = minimize(lambda x: ((x - wanted) ** 2).sum(), wanted, constraints=constraints).x
    np.testing.assert_allclose(figures._spread(wanted, apart, 0.0, 1.0), best, atol=1e-4)
