"""Mirrored unlearning: a diffusion model forgets a query, and what that costs is the score."""

from forebear.methods.mucs.fitted import FittedMUCS, Unlearned
from forebear.methods.mucs.method import MUCS

__all__ = ["MUCS", "FittedMUCS", "Unlearned"]
