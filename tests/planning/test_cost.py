"""Fitted costs find the coefficients that points were made with, and say what the whole takes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebear.planning.child import Request
from forebear.planning.cost import Cost, Point, extrapolate
from forebear.planning.predict import predicted
from forebear.planning.sample import Sample
from forebear.planning.terms import PAIRS, PASSES, Facts

SIZES = ((256, 8), (256, 100), (512, 100), (1024, 100), (4096, 100), (4096, 8))


def points_of(truth: Cost, sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Point]:
    return [Point(n, q, truth.at(n, q)) for n, q in sizes]


def seconds_of(points: list[Point]) -> list[float]:
    return [point.seconds for point in points]


@settings(deadline=None)
@given(
    st.floats(0.01, 1.0),
    st.floats(1e-6, 1e-3),
    st.floats(1e-8, 1e-5),
    st.integers(10_000, 10**7),
    st.integers(1, 1000),
)
def test_known_coefficients_are_recovered(
    fixed: float, example: float, pair: float, n: int, q: int
) -> None:
    truth = Cost({"1": fixed, "n": example, "nq": pair})
    points = points_of(truth)
    _, found = extrapolate(points, seconds_of(points), PASSES, n, q)
    assert found.value == pytest.approx(truth.at(n, q), rel=0.01)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("square", [1e-8, 1e-6])
def test_squares_are_found_by_methods_that_have_them(square: float) -> None:
    truth = Cost({"1": 0.1, "n": 1e-5, "n2": square})
    points = points_of(truth)
    _, found = extrapolate(points, seconds_of(points), PAIRS, 40_000, 100)
    assert found.value == pytest.approx(truth.at(40_000, 100), rel=0.02)
    _, blind = extrapolate(points, seconds_of(points), PASSES, 40_000, 100)
    assert blind.value < 0.9 * found.value


def test_ten_per_cent_of_noise_stays_within_the_range_and_a_factor_of_two() -> None:
    truth = Cost({"1": 0.2, "n": 1e-4, "nq": 1e-7})
    inside = 0
    for seed in range(50):
        noise = np.random.default_rng(seed).normal(1, 0.1, len(SIZES))
        points = points_of(truth)
        values = [p.seconds * float(x) for p, x in zip(points, noise, strict=True)]
        _, found = extrapolate(points, values, PASSES, 20_000, 100)
        assert 0.5 < found.value / truth.at(20_000, 100) < 2
        inside += found.low <= truth.at(20_000, 100) <= found.high
    assert inside >= 35  # it is a range of what was seen, not a proof


def test_a_filled_batch_does_not_grow_with_the_examples() -> None:
    truth = Cost({"1": 400.0, "batch": 0.5}, batch=512)
    points = points_of(truth)
    cost, found = extrapolate(
        points, seconds_of(points), ("1", "nq", "batch", "n"), 10**6, 100, batch=512
    )
    assert found.value == pytest.approx(656, rel=0.01)
    assert cost.at(100, 100) == pytest.approx(450, rel=0.01)


def test_what_points_cannot_tell_apart_is_not_invented() -> None:
    points = [Point(n, 10, 0.1 + 1e-4 * n) for n in (100, 200, 400)]
    cost = Cost.fitted(points, seconds_of(points), PASSES)
    assert set(cost.coefficients) == {"1", "n"}


def test_one_point_says_at_least_itself() -> None:
    points = [Point(100, 5, 2.0)]
    _, found = extrapolate(points, [2.0], PASSES, 1000, 5)
    assert found.value == pytest.approx(2.0)


def test_a_sample_of_one_size_is_taken_to_grow_with_the_examples() -> None:
    sample = Sample(start=1.0, facts=Facts(10_000, 8, 100), stopped="too slow")
    sample.points = [Point(100, 8, 2.0, 1e8, 50.0)] * 2
    found = predicted(sample, Request("f.py", "attribute"), 10_000, 8)
    assert found is not None
    assert found.seconds.value == pytest.approx(1 + 200)
    assert found.disk.value == pytest.approx(5000)
    assert found.memory.value < 6e8


def test_memory_grows_up_to_the_examples_that_are_worked_on_at_a_time() -> None:
    sizes = ((20, 8), (20, 8), (20, 2), (30, 8), (40, 2), (40, 8))
    points = [Point(n, q, 0.1 * n, 1e8 + 1e6 * n, 0.0) for n, q in sizes]
    found = {}
    for step in (None, 60):
        sample = Sample(facts=Facts(10_000, 8, 100, step=step), points=points)
        prediction = predicted(sample, Request("f.py", "attribute"), 10_000, 8)
        assert prediction is not None
        found[step] = prediction.memory.value
    assert found[60] == pytest.approx(1e8 + 60e6, rel=0.05)
    assert found[None] == pytest.approx(1e8 + 512e6, rel=0.05)


def test_gradients_that_are_kept_grow_with_the_examples_and_not_with_their_square() -> None:
    """Samples of the dual form of a kernel: 1 MB an example, and memory that differs by chance."""
    sizes = ((100, 8), (100, 8), (200, 8), (400, 2), (400, 8))
    chance = (0.0, 0.0, 2e6, -2e6, 3e6)
    points = [
        Point(n, q, 0.1 * n, 1e8 + 1e6 * n + more, 0.0)
        for (n, q), more in zip(sizes, chance, strict=True)
    ]
    sample = Sample(facts=Facts(4000, 8, 10**6), points=points, terms=(*PAIRS, "n3"))
    found = predicted(sample, Request("f.py", "attribute"), 4000, 8)
    assert found is not None
    assert found.memory.value == pytest.approx(4.1e9, rel=0.1)


def test_a_sample_without_an_end_says_at_least_its_time() -> None:
    sample = Sample(start=1.0, facts=Facts(10_000, 8, 100), stopped="too slow")
    found = predicted(sample, Request("f.py", "attribute", seconds=5), 10_000, 8)
    assert found is not None
    assert found.at_least
    assert found.seconds.value == 6
