"""Do scores agree with models retrained without one example?"""

from typing import Any

import numpy as np

from forebear.errors import DataError
from forebear.metrics.arrays import numbers
from forebear.metrics.correlation import correlations, warn_of_constants


def loo_correlation(
    scores: Any,
    effects: Any = None,
    *,
    outcomes_without: Any = None,
    kind: str = "pearson",
) -> np.ndarray:
    """Correlation over examples between scores and real leave-one-out effects, `[q]`.

    An effect is the measurement with the example minus without it. A constant added to a query's
    effects changes no correlation, so minus the outcomes without each example serve as well.

    Args:
        scores: `[q, n]` or `Scores`; for truth on some examples only, the columns of those.
        effects: `[q, n]`, oriented and signed as scores are.
        outcomes_without: `[n, q]` in place of effects, the measurement of each query without each
            example.
        kind: `"pearson"` or `"spearman"`.

    Raises:
        DataError: shapes do not agree, both or neither truth was given, or n is below three.
    """
    scores = numbers(scores, "scores", (None, None))
    queries, n = scores.shape
    if (outcomes_without is None) == (effects is None):
        raise DataError("give either outcomes_without [n, q] or effects [q, n]")
    if effects is not None:
        truth = numbers(effects, "effects", (queries, n)).T
    else:
        truth = -numbers(outcomes_without, "outcomes_without", (n, queries))
    if n < 3:
        raise DataError(f"{n} examples were left out: a correlation needs at least 3")
    values = correlations(scores.T, truth, kind)
    warn_of_constants(values, "leave-one-out correlation")
    return values
