"""Damping: relative by default, and never a number that cannot be meant."""

import math
from typing import Any

import pytest

import forebear as fb
from forebear.curvature import as_damping


@pytest.mark.parametrize(
    ("damping", "value"),
    [
        (fb.Relative(0.1), 0.4),
        (fb.Relative(), 0.4),
        (fb.Absolute(0.1), 0.1),
        (fb.Horizon(0.1, 50), 0.2),
    ],
)
def test_the_value_for_a_block_with_mean_eigenvalue_four(damping: Any, value: float) -> None:
    assert damping.value(4.0) == pytest.approx(value)
    assert as_damping(damping) is damping


def test_a_number_is_relative() -> None:
    assert as_damping(0.1) == fb.Relative(0.1)
    assert as_damping(0) == fb.Relative(0)


@pytest.mark.parametrize(
    "damping",
    [-0.1, math.nan, math.inf, fb.Absolute(-1.0), fb.Relative(math.nan), fb.Horizon(0.1, -5)],
)
def test_negative_and_infinite_damping_is_refused(damping: Any) -> None:
    with pytest.raises(fb.errors.DataError, match="finite and not negative"):
        as_damping(damping)
