"""How scores are held against retrained models."""

import warnings
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from forebear import metrics
from forebear.errors import NumericalWarning
from forebear.metrics.correlation import correlations
from forebear.training import GroundTruth

RESAMPLES = 100
"""Bootstrap draws of the subsets."""


@dataclass(frozen=True)
class Judgement:
    """The LDS of scores on a group of queries.

    Attributes:
        values: of each query, `[q]`.
        error: standard error of their mean under other choices of the subsets.
    """

    values: np.ndarray
    error: float

    @property
    def mean(self) -> float:
        """Over the queries that have one."""
        return float(np.nanmean(self.values))

    @property
    def text(self) -> str:
        """Mean and half of a 95 % interval."""
        return f"{self.mean:.3f} ±{1.96 * self.error:.2f}"


def judge(scores: Tensor, truth: GroundTruth, rows: Tensor) -> Judgement:
    """LDS of the scores `[q, n]` of the queries at `rows`."""
    outcomes = truth.mean_outcomes[:, rows]
    with warnings.catch_warnings():
        # A method that gives a query the same score for all has no LDS there.
        warnings.simplefilter("ignore", NumericalWarning)
        values = metrics.lds(scores, truth.subsets, outcomes)
    return Judgement(values, subset_error(scores, truth.subsets, outcomes))


def subset_error(
    scores: Tensor, subsets: Tensor, outcomes: Tensor, *, resamples: int = RESAMPLES, seed: int = 0
) -> float:
    """Standard error of the mean LDS, by a bootstrap over subsets.

    Means of resamples lie below the mean itself, since a subset that is drawn twice makes ties; so
    only their spread is used.
    """
    centred = scores.double() - scores.double().mean(1, keepdim=True)
    predicted = (subsets.double() @ centred.T).numpy()  # [m, q]
    measured = outcomes.double().numpy()
    random = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = random.integers(len(measured), size=len(measured))
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            means.append(np.nanmean(correlations(predicted[drawn], measured[drawn])))
    return float(np.nanstd(means))


def ceiling(truth: GroundTruth, rows: slice) -> tuple[float, float]:
    """Agreement between seeds, and the LDS it leaves to a perfect predictor; means over queries."""
    if len(truth.seeds) < 2:
        return float("nan"), float("nan")
    found = metrics.noise_ceiling(truth.outcomes[:, :, rows])
    return float(np.nanmean(found.agreement)), float(np.nanmean(found.ceiling))


def paired_difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean and standard error over queries of the difference between two LDS."""
    difference = one - other
    kept = difference[~np.isnan(difference)]
    return float(kept.mean()), float(kept.std(ddof=1) / np.sqrt(len(kept)))


def standardised(scores: Tensor) -> Tensor:
    """Z-scores of each query, `[q, n]`; zero where all scores are the same."""
    centred = scores.double() - scores.double().mean(1, keepdim=True)
    return centred / centred.std(1, keepdim=True).clamp_min(1e-300)


def ranked(scores: Tensor) -> Tensor:
    """Ranks of each query as z-scores, `[q, n]`."""
    return standardised(scores.double().argsort(1).argsort(1).double())
