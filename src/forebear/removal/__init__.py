"""What a model would be without some of its training examples."""

from forebear.removal.bounds import Bound, distance_bound, laws
from forebear.removal.estimate import RemovalEstimate, Removed
from forebear.removal.estimators import ESTIMATORS, shift
from forebear.removal.models import LinearModel
from forebear.removal.problem import Factorised

__all__ = [
    "ESTIMATORS",
    "Bound",
    "Factorised",
    "LinearModel",
    "RemovalEstimate",
    "Removed",
    "distance_bound",
    "laws",
    "shift",
]
