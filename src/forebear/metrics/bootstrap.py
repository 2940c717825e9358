"""The one confidence interval of forebear."""

import warnings
from typing import Any

import numpy as np

from forebear.errors import DataError, NumericalWarning


def bootstrap_interval(
    values: Any, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, after Efron (1979).

    Args:
        values: `[q]`, one value a query; NaN are left out and counted in a warning.
        level: of confidence.
        resamples: number of draws of q values with replacement.
        seed: of the draws.

    Raises:
        DataError: there is no value, or the level is not between 0 and 1.
    """
    values = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, float)
    if values.ndim != 1:
        raise DataError(f"values have shape {values.shape}: give one value a query, [q]")
    if not 0 < level < 1:
        raise DataError(f"level is {level}: it must be between 0 and 1, such as 0.95")
    if resamples < 1:
        raise DataError(f"resamples is {resamples}: at least 1 is needed")
    kept = values[~np.isnan(values)]
    if len(kept) < len(values):
        warnings.warn(
            f"{len(values) - len(kept)} of {len(values)} values are NaN and left out of the "
            "interval",
            NumericalWarning,
            stacklevel=2,
        )
    if not len(kept):
        raise DataError("there is no value to make an interval of")
    draws = np.random.default_rng(seed).integers(0, len(kept), (resamples, len(kept)))
    means = kept[draws].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
