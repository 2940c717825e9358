"""What a curvature is to the methods: an inner product between gradients."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Gradients
from forebear.curvature.damping import Damping
from forebear.data import Data
from forebear.differentiation import Function
from forebear.task import Task

QUERY_BYTES = 2**27
"""Memory that prepared queries may take at a time (128 MB); more queries come in groups."""


class GradientStream(Protocol):
    """Gradients of a dataset, batch by batch: as they are, projected, or kept in memory."""

    @property
    def task(self) -> Task:
        """Model and functions."""
        ...

    @property
    def plan(self) -> Plan:
        """Blocks of the gradients."""
        ...

    @property
    def data(self) -> Data:
        """What is run over."""
        ...

    def gradients(
        self, function: Function, description: str
    ) -> Iterator[tuple[slice, Tensor, Gradients]]:
        """Positions, values `[b]` and gradients of `function`."""
        ...

    def batches(self, description: str) -> Iterator[tuple[slice, Any]]:
        """Positions and batches."""
        ...


class FittedCurvature(Protocol):
    """The inner product `⟨p, q⟩ = pᵀ (C + λI)⁻¹ q` of a fitted curvature C.

    Work that depends only on queries is done once, in `prepare`.
    """

    def query_bytes(self, query: Gradients, queries: int) -> int:
        """Bytes that one prepared query takes, judged by the shapes of one, among so many."""
        ...

    def prepare(self, queries: Gradients) -> Any:
        """Whatever `products` needs of the queries."""
        ...

    def products(self, prepared: Any, train: Gradients) -> Tensor:
        """Inner products of all pairs, `[q, b]`."""
        ...

    def squared_norms(self, gradients: Gradients) -> Tensor:
        """Inner product of each gradient with itself, `[b]`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The fitted state, to be saved."""
        ...

    def details(self) -> dict[str, Any]:
        """What belongs into the record: `damping_used` by block, a solver's residual."""
        ...


class Curvature(Protocol):
    """A choice of C: a frozen configuration."""

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> FittedCurvature:
        """Estimate C from the gradients of `function` over a stream."""
        ...

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> FittedCurvature:
        """The fitted curvature that was saved as `tensors`; it may go over the data again."""
        ...
