"""Noise that belongs to an example: distribution and independence of everything else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from forebear.tasks.noise import FIRST, SECOND, STEP, gaussian, mixed, uniform

KEYS = torch.arange(4000)


def test_the_hash_is_splitmix64() -> None:
    """Against the published algorithm in unbounded integers."""

    def published(state: int) -> int:
        mask = (1 << 64) - 1
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        return state ^ (state >> 31)

    mask = (1 << 64) - 1
    assert (STEP & mask, FIRST & mask, SECOND & mask) == (
        0x9E3779B97F4A7C15,
        0xBF58476D1CE4E5B9,
        0x94D049BB133111EB,
    )
    states = [0, 1, 2, 12345, (1 << 63) - 1, -1, -(1 << 63), 987654321987654321]
    found = mixed(torch.tensor(states)).tolist()
    assert [value & mask for value in found] == [published(s & mask) for s in states]


def test_numbers_are_normal() -> None:
    numbers = gaussian(KEYS, (64,), 0.0, 50.0, 0.0, dtype=torch.float64).flatten().numpy()
    assert stats.kstest(numbers, "norm").pvalue > 1e-3
    assert abs(stats.skew(numbers)) < 0.02
    assert abs(stats.kurtosis(numbers)) < 0.04


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 5, 5)])
def test_coordinates_and_pixels_are_independent(shape: tuple[int, ...]) -> None:
    here = gaussian(KEYS, shape, 0.0, 50.0, 0.0).flatten(1).double()
    others = [(1.0, 50.0, 0.0), (0.0, 51.0, 0.0), (0.0, 50.0, 1.0), (50.0, 0.0, 0.0)]
    for coordinates in others:
        there = gaussian(KEYS, shape, *coordinates).flatten(1).double()
        bound = 5 / np.sqrt(here.numel())
        assert abs((here * there).mean().item()) < bound
    assert abs((here[1:] * here[:-1]).mean().item()) < 5 / np.sqrt(here.numel())
    correlation = torch.corrcoef(here.T) if here.shape[1] > 1 else torch.eye(1)
    off = correlation - torch.eye(len(correlation))
    assert off.abs().max() < 6 / np.sqrt(len(KEYS))


@given(
    keys=st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=8, unique=True),
    start=st.integers(0, 7),
    level=st.floats(0.001, 1000),
)
@settings(max_examples=50, deadline=None)
def test_batch_and_order_make_no_difference(keys: list[int], start: int, level: float) -> None:
    whole = gaussian(torch.tensor(keys), (3, 2), 0.0, level)
    start %= len(keys)
    part = gaussian(torch.tensor(keys[start:][::-1]), (3, 2), 0.0, level)
    assert torch.equal(part, whole[start:].flip(0))


def test_precision_only_rounds() -> None:
    double = gaussian(KEYS, (3,), 1.0, dtype=torch.float64)
    assert torch.equal(gaussian(KEYS, (3,), 1.0), double.float())


def test_uniform_numbers_are_uniform() -> None:
    numbers = uniform(torch.arange(20000), 3.0).numpy()
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03
