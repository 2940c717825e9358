"""How well retrainings agree with each other: no prediction can do much better."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import numpy as np

from forebear.errors import DataError
from forebear.metrics.arrays import numbers
from forebear.metrics.correlation import correlations, warn_of_constants

SPLITS = 50
"""Splits of the seeds that are averaged at most."""


@dataclass(frozen=True)
class NoiseCeiling:
    """Reliability of outcomes that were averaged over seeds.

    Attributes:
        agreement: `[q]` rank correlation between the means of two halves of the seeds.
        reliability: `[q]` that between the mean of all seeds and another mean of as many,
            extrapolated after Spearman and Brown: 2r / (1 + r) for two equal halves.
        ceiling: `[q]` its square root: the LDS that a perfect predictor of the expected outcome
            can expect. Zero where retrainings do not agree at all.
    """

    agreement: np.ndarray
    reliability: np.ndarray
    ceiling: np.ndarray


def noise_ceiling(outcomes: Any) -> NoiseCeiling:
    """The noise ceiling of each query from retrainings with several seeds.

    The formula is exact for Pearson correlation and independent noise; for ranks it is the usual
    approximation. Seeds share subsets, so agreement is only about noise of training, not about
    the choice of subsets.

    Args:
        outcomes: `[seeds, m, q]`; two seeds or more. All splits into halves are averaged; of an
            odd number each seed is left aside in turn.

    Raises:
        DataError: there are fewer than two seeds or three subsets.
    """
    outcomes = numbers(outcomes, "outcomes", (None, None, None))
    seeds, m, _ = outcomes.shape
    if seeds < 2 or m < 3:
        raise DataError(
            f"outcomes have {seeds} seeds and {m} subsets: agreement needs at least 2 and 3"
        )
    pairs = [
        correlations(outcomes[list(one)].mean(0), outcomes[list(other)].mean(0))
        for one, other in islice(halves(seeds), SPLITS)
    ]
    agreement = np.mean(pairs, axis=0)
    warn_of_constants(agreement, "noise ceiling")
    longer = seeds / (seeds // 2)
    reliability = longer * agreement / (1 + (longer - 1) * np.maximum(agreement, 0))
    return NoiseCeiling(agreement, reliability, np.sqrt(np.maximum(reliability, 0)))


def halves(seeds: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All splits into two equal halves; of an odd number each seed is left aside in turn."""
    half = seeds // 2
    for used in combinations(range(seeds), 2 * half):
        for rest in combinations(used[1:], half - 1):  # the first stays: each split once
            one = (used[0], *rest)
            yield one, tuple(seed for seed in used if seed not in one)
