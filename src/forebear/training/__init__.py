"""How models were trained: recipes, subsets, ensembles of retrainings and ground truth."""

from forebear.training.ensemble import Ensemble
from forebear.training.further import FurtherTraining
from forebear.training.recipe import Recipe
from forebear.training.removal import RemovalOutcomes, removal_outcomes
from forebear.training.response import Response
from forebear.training.subsets import half_subsets, leave_group_out, leave_one_out_subsets
from forebear.training.truth import GroundTruth

__all__ = [
    "Ensemble",
    "FurtherTraining",
    "GroundTruth",
    "Recipe",
    "RemovalOutcomes",
    "Response",
    "half_subsets",
    "leave_group_out",
    "leave_one_out_subsets",
    "removal_outcomes",
]
