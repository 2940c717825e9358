"""Choices of curvature, one file each; all are inner products between gradients."""

from forebear.curvature.base import Curvature, FittedCurvature
from forebear.curvature.damping import Absolute, Damping, Horizon, Relative, as_damping
from forebear.curvature.dense import Dense
from forebear.curvature.identity import Identity
from forebear.curvature.kronecker import Kronecker

__all__ = [
    "Absolute",
    "Curvature",
    "Damping",
    "Dense",
    "FittedCurvature",
    "Horizon",
    "Identity",
    "Kronecker",
    "Relative",
    "as_damping",
]
