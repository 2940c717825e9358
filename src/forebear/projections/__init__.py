"""Random projections of gradients, one file each."""

from forebear.projections.base import PreparedProjection, Projection
from forebear.projections.gaussian import Gaussian
from forebear.projections.names import Compression, compressed
from forebear.projections.sjlt import SJLT
from forebear.projections.stream import KeptStream, ProjectedStream, projected_plan
from forebear.projections.tensor_sketch import TensorSketch
from forebear.projections.two_sided import TwoSided

__all__ = [
    "SJLT",
    "Compression",
    "Gaussian",
    "KeptStream",
    "PreparedProjection",
    "ProjectedStream",
    "Projection",
    "TensorSketch",
    "TwoSided",
    "compressed",
    "projected_plan",
]
