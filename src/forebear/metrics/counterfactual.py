"""What removing the strongest examples changes, against removing as many at random."""

from dataclasses import dataclass
from typing import Any

from scipy import stats

from forebear.errors import DataError
from forebear.metrics.arrays import numbers


@dataclass(frozen=True)
class Shift:
    """Changes after a removal, held against those after a random removal.

    Attributes:
        mean: of the changes.
        random: of the changes after random removals.
        ratio: of the two.
        auc: chance that a change is larger than one after a random removal; 0.5 says nothing.
        p: of the one-sided Mann-Whitney test that changes are larger.
    """

    mean: float
    random: float
    ratio: float
    auc: float
    p: float


def removal_shift(changes: Any, random: Any) -> Shift:
    """Whether removing what a method chose changes more than removing as many at random.

    Args:
        changes: `[m]`, one for each query: a distance of the regenerated image, a rise of the loss.
        random: `[r]`, the same after random removals, of any number.

    Raises:
        DataError: either is empty.
        NonFiniteError: a change is NaN or infinite.
    """
    mine, base = numbers(changes, "changes", (None,)), numbers(random, "random", (None,))
    if not len(mine) or not len(base):
        raise DataError(f"{len(mine)} changes and {len(base)} random ones: give at least one each")
    test = stats.mannwhitneyu(mine, base, alternative="greater")
    mean, by_chance = float(mine.mean()), float(base.mean())
    return Shift(
        mean=mean,
        random=by_chance,
        ratio=mean / by_chance if by_chance else float("nan"),
        auc=float(test.statistic) / (len(mine) * len(base)),
        p=float(test.pvalue),
    )
