"""Nonparametric diffusion attribution: which training patches an optimal denoiser would use."""

from forebear.methods.nda.fitted import FittedNDA
from forebear.methods.nda.maps import Maps, Sources
from forebear.methods.nda.method import NDA

__all__ = ["NDA", "FittedNDA", "Maps", "Sources"]
