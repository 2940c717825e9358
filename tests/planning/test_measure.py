"""Which sizes are sampled, and what is measured while they run."""

from pathlib import Path

import pytest
import torch

from forebear.methods import fitted_influence
from forebear.planning.measure import ladder, measured, sharing_limits


class Clock:
    """Runs that take a known time each, on a clock of their own."""

    def __init__(self, seconds: float, cost: object) -> None:
        self.left, self.cost = seconds, cost
        self.sizes: list[tuple[int, int]] = []

    def run(self, n: int, q: int) -> float:
        taken = self.cost(n, q)  # type: ignore[operator]
        self.left -= taken
        self.sizes.append((n, q))
        return taken


def climb(clock: Clock, *, first: int, most: int, queries: int, power: int = 1) -> None:
    ladder(clock.run, first, most, queries, lambda: clock.left, power)


def test_with_much_time_the_largest_size_and_all_queries_are_reached() -> None:
    clock = Clock(1000.0, lambda n, q: 1e-5 * n)
    climb(clock, first=256, most=5000, queries=100)
    assert clock.sizes[:3] == [(256, 8), (256, 8), (256, 100)]
    assert (5000, 100) in clock.sizes
    assert any(q == 8 and n > 256 for n, q in clock.sizes)


@pytest.mark.parametrize("power", [1, 2])
def test_what_is_left_bounds_what_is_run(power: int) -> None:
    clock = Clock(10.0, lambda n, q: 0.1 * (n / 256) ** power * (1 + q / 50))
    climb(clock, first=256, most=10**6, queries=500, power=power)
    assert -5.0 < clock.left < 10.0
    assert max(n for n, _ in clock.sizes) >= 512


def test_an_expensive_method_still_gets_two_sizes_of_queries_or_none() -> None:
    clock = Clock(1.0, lambda n, q: 2.0)
    climb(clock, first=256, most=10**6, queries=500)
    assert clock.sizes[:2] == [(256, 8), (256, 8)]
    assert all(q == 8 for _, q in clock.sizes)


def test_a_store_has_no_queries() -> None:
    clock = Clock(10.0, lambda n, q: 1e-5 * n)
    climb(clock, first=256, most=1024, queries=0)
    assert {q for _, q in clock.sizes} == {0}


def test_memory_and_disk_are_those_of_the_work() -> None:
    def work(folder: Path) -> None:
        (folder / "out").mkdir()
        (folder / "out" / "file").write_bytes(bytes(1000))
        (folder / "elsewhere").write_bytes(bytes(5000))
        torch.ones(2**26)  # 256 MB

    small = measured(lambda folder: None, 1.0)
    large = measured(work, 1.0)
    assert large["disk"] == 1000
    assert small["disk"] == 0
    assert large["memory"] - small["memory"] == pytest.approx(2**28, rel=0.1)
    assert measured(lambda folder: None, 1.0)["memory"] < small["memory"] + 2**26


def test_limits_are_shared_and_given_back() -> None:
    before = fitted_influence.FEATURE_BYTES
    with sharing_limits(0.25):
        assert before // 4 == fitted_influence.FEATURE_BYTES
    assert before == fitted_influence.FEATURE_BYTES
