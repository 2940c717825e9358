"""Random projections of gradients, one file each."""

from forebear.projections.base import PreparedProjection, Projection
from forebear.projections.gaussian import Gaussian
from forebear.projections.stream import KeptStream, ProjectedStream, projected_plan
from forebear.projections.tensor_sketch import TensorSketch

__all__ = [
    "Gaussian",
    "KeptStream",
    "PreparedProjection",
    "ProjectedStream",
    "Projection",
    "TensorSketch",
    "projected_plan",
]
