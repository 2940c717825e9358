"""Choices of curvature, one file each; all are inner products between gradients."""

from forebear.curvature.base import Curvature, FittedCurvature
from forebear.curvature.conjugate_gradients import ConjugateGradients
from forebear.curvature.damping import (
    Absolute,
    Damping,
    EffectiveDimension,
    Horizon,
    NonzeroRelative,
    Relative,
    as_damping,
)
from forebear.curvature.datainf import DataInf
from forebear.curvature.dense import Dense
from forebear.curvature.diagonal import Diagonal
from forebear.curvature.gram import GramSpectrum, Whole
from forebear.curvature.identity import Identity
from forebear.curvature.kronecker import Kronecker
from forebear.curvature.lissa import LiSSA
from forebear.curvature.low_rank import Arnoldi, Nystrom

__all__ = [
    "Absolute",
    "Arnoldi",
    "ConjugateGradients",
    "Curvature",
    "Damping",
    "DataInf",
    "Dense",
    "Diagonal",
    "EffectiveDimension",
    "FittedCurvature",
    "GramSpectrum",
    "Horizon",
    "Identity",
    "Kronecker",
    "LiSSA",
    "NonzeroRelative",
    "Nystrom",
    "Relative",
    "Whole",
    "as_damping",
]
