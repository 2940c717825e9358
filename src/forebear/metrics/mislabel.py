"""Does a suspicion put the wrong labels first?"""

from typing import Any

import numpy as np
from scipy.stats import rankdata

from forebear.errors import DataError
from forebear.metrics.arrays import flags, numbers


def mislabel_auc(suspicion: Any, flipped: Any) -> float:
    """Chance that a flipped label is more suspicious than a true one; ties count half.

    Args:
        suspicion: `[n]`, higher = more likely wrong.
        flipped: bool `[n]`.

    Raises:
        DataError: shapes do not agree, or no label or every label is flipped.
    """
    suspicion, flipped = _checked(suspicion, flipped)
    wrong = int(flipped.sum())
    right = len(flipped) - wrong
    if not right:
        raise DataError("every label is flipped: there is nothing to tell them from")
    ranks = rankdata(suspicion)[flipped].sum()  # Mann-Whitney's U is the area under the curve
    return float((ranks - wrong * (wrong + 1) / 2) / (wrong * right))


def found_in_first(suspicion: Any, flipped: Any, fraction: float) -> float:
    """Share of the flipped labels among the most suspicious `fraction` of all examples.

    Examples that tie at the cut count with the chance that they are looked at.

    Args:
        suspicion: `[n]`, higher = more likely wrong.
        flipped: bool `[n]`.
        fraction: share of the examples that a person looks at, above 0 and up to 1.

    Raises:
        DataError: shapes do not agree, no label is flipped, or the fraction is out of range.
    """
    suspicion, flipped = _checked(suspicion, flipped)
    if not 0 < fraction <= 1:
        raise DataError(f"fraction is {fraction}: it must be above 0 and at most 1")
    looked = max(1, round(fraction * len(suspicion)))
    cut = np.sort(suspicion)[::-1][looked - 1]
    above, level = suspicion > cut, suspicion == cut
    chance = (looked - above.sum()) / level.sum()
    found = flipped[above].sum() + chance * flipped[level].sum()
    return float(found / flipped.sum())


def _checked(suspicion: Any, flipped: Any) -> tuple[np.ndarray, np.ndarray]:
    suspicion = numbers(suspicion, "suspicion", (None,))
    flipped = flags(flipped, "flipped", suspicion.shape)
    if not flipped.any():
        raise DataError("no label is flipped: there is nothing to find")
    return suspicion, flipped
