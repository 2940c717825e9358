"""Projections by the names that methods take as options."""

from typing import Literal

from forebear.errors import unknown_name
from forebear.projections.base import Projection
from forebear.projections.gaussian import Gaussian
from forebear.projections.sjlt import SJLT
from forebear.projections.tensor_sketch import TensorSketch

Compression = Literal["tensor_sketch", "gaussian", "sjlt"]

KINDS = {"tensor_sketch": TensorSketch, "gaussian": Gaussian, "sjlt": SJLT}


def compressed(dimension: int | None, projection: Compression) -> Projection | None:
    """A projection by name; none without a dimension.

    Raises:
        UnknownNameError: there is no such projection.
    """
    if projection not in KINDS:
        raise unknown_name("projection", str(projection), KINDS)
    return None if dimension is None else KINDS[projection](dimension)
