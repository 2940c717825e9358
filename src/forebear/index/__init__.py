"""Approximate nearest neighbours over a store: built from it, rebuilt from it, held against it."""

from forebear.index.base import FoundRows, Index, Recall, Trial
from forebear.index.building import KINDS, StoredIndex, build, open

__all__ = ["KINDS", "FoundRows", "Index", "Recall", "StoredIndex", "Trial", "build", "open"]
