"""The Gauss-Newton matrix as a product `RᵀR / n`, a few rows of R for each example."""

from collections.abc import Iterator

from forebear.capture import Gradients
from forebear.curvature.base import GradientStream
from forebear.curvature.outputs import AllTargets, gradients_of_each


def rows_per_example(stream: GradientStream) -> int:
    """Rows of R for each example: as many as the model has outputs, one less for softmax.

    Raises:
        TaskError: the loss is a plain callable, or there are more outputs than passes are made for.
    """
    return AllTargets(stream).count


def root_gradients(stream: GradientStream) -> Iterator[tuple[slice, int, Gradients]]:
    """Rows of R, factored: positions of the examples, which of their rows, gradients.

    Not for projected streams.
    """
    start = 0
    for each in gradients_of_each(stream, AllTargets(stream), "Gauss-Newton"):
        size = len(next(iter(each[0].values()))[0].right)
        for k, gradients in enumerate(each):
            yield slice(start, start + size), k, gradients
        start += size
