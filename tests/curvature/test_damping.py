"""Damping: relative by default, and never a number that cannot be meant."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import forebear as fb
from forebear.curvature import as_damping
from forebear.curvature.damping import damped_inverse, damping_for

EIGENVALUES = torch.tensor([0.0, 1e-9, 0.03, 0.5, 4.0, 9.99, 10.0, 13.0, 20.0]).double()


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


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, math.nan])
def test_an_effective_dimension_is_a_fraction(fraction: float) -> None:
    with pytest.raises(fb.errors.DataError, match="between 0 and 1"):
        as_damping(fb.EffectiveDimension(fraction))


def test_what_is_no_damping_is_refused() -> None:
    with pytest.raises(fb.errors.DataError, match=r"'strong'.*fb\.EffectiveDimension"):
        as_damping("strong")  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_an_exact_horizon_is_so_many_steps_of_gradient_descent(steps: int) -> None:
    """Against the recursion itself: x ← x + η (1 − h x) from zero, where 1 / h is the end."""
    rate, x = 0.1, torch.zeros_like(EIGENVALUES)
    for _ in range(steps):
        x = x + rate * (1 - EIGENVALUES * x)
    found = damped_inverse(fb.Horizon(rate, steps, exact=True), 0.0, EIGENVALUES)
    assert torch.allclose(found, x, rtol=1e-10)


@given(st.floats(1e-4, 20.0), st.integers(1, 10_000))
def test_an_exact_horizon_lies_between_its_two_limits(h: float, steps: int) -> None:
    """At most ηT and, for ηh up to one, at most 1/h; near 1/(h + 1/ηT), as λ = 1/(ηT) has it."""
    eigenvalue = torch.tensor([h], dtype=torch.float64)
    rate = 0.05
    found = damped_inverse(fb.Horizon(rate, steps, exact=True), 0.0, eigenvalue).item()
    assert 0 < found <= min(rate * steps, 1 / h) * (1 + 1e-9)
    surrogate = 1 / (h + 1 / (rate * steps))
    assert surrogate * (1 - 1e-9) <= found <= 2 * surrogate


def test_an_exact_horizon_that_diverges_is_refused() -> None:
    with pytest.raises(fb.errors.TaskError, match=r"h_max = 20: .* learning rate is 0\.1"):
        damped_inverse(fb.Horizon(0.11, 5, exact=True), 0.0, EIGENVALUES)


@given(st.floats(0.01, 0.99), st.integers(3, 60))
def test_an_effective_dimension_is_reached(fraction: float, examples: int) -> None:
    eigenvalues = torch.logspace(-8, 2, 60).double()
    damping = damping_for(fb.EffectiveDimension(fraction), eigenvalues, examples)
    reached = (eigenvalues / (eigenvalues + damping)).sum().item()
    assert reached == pytest.approx(fraction * min(examples, 60), rel=1e-6)


def test_an_effective_dimension_above_the_rank_is_refused() -> None:
    eigenvalues = torch.tensor([1.0, 0.5, 0.0, 0.0]).double()
    with pytest.raises(fb.errors.TaskError, match=r"2 eigenvalues above zero.*smaller fraction"):
        damping_for(fb.EffectiveDimension(0.5), eigenvalues, 10)


@pytest.mark.parametrize(
    "damping", [fb.Horizon(0.1, 5, exact=True), fb.EffectiveDimension(0.5)], ids=["exact", "rule"]
)
def test_what_needs_eigenvalues_is_refused_without_them(damping: Any) -> None:
    with pytest.raises(fb.errors.TaskError, match="use exact, ekfac"):
        damping.value(1.0)
