"""Linear datamodelling score: do scores predict models trained on other subsets?"""

from typing import Any

import numpy as np

from forebear.errors import DataError
from forebear.metrics.arrays import flags, numbers
from forebear.metrics.correlation import correlations, warn_of_constants


def lds(scores: Any, subsets: Any, outcomes: Any) -> np.ndarray:
    """Linear datamodelling score of each query, `[q]`, after Park et al. (2023).

    Spearman correlation, over subsets S, between the prediction `Σ_{z ∈ S} score(q, z)` and the
    measurement of q under a model trained on S. Judge it against `noise_ceiling`.

    Args:
        scores: `[q, n]` or `Scores`, positive = proponent.
        subsets: bool `[m, n]`, the examples each model was trained on.
        outcomes: `[m, q]`, measurements averaged over seeds.

    Raises:
        DataError: shapes do not agree, or there are fewer than three subsets.
        NonFiniteError: a score or outcome is NaN or infinite.
    """
    scores = numbers(scores, "scores", (None, None))
    queries, n = scores.shape
    subsets = flags(subsets, "subsets", (None, n))
    outcomes = numbers(outcomes, "outcomes", (len(subsets), queries))
    if len(subsets) < 3:
        raise DataError(f"{len(subsets)} subsets were given: a rank correlation needs at least 3")
    # Subsets of one size shift all predictions by the same amount when scores are centred, and
    # centring keeps the sums of large offsets from losing the digits that differ.
    sizes = subsets.sum(1)
    if (sizes == sizes[0]).all():
        scores = scores - scores.mean(1, keepdims=True)
    values = correlations(subsets.astype(np.float64) @ scores.T, outcomes)
    warn_of_constants(values, "LDS")
    return values
