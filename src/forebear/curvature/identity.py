"""No curvature: the Euclidean inner product of gradients."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Gradients
from forebear.curvature.base import GradientStream
from forebear.curvature.damping import Damping
from forebear.differentiation import Function
from forebear.gradients import (
    Precision,
    QuerySide,
    positions_of,
    prefers_matrix,
    products,
    query_side,
    squared_norms,
)
from forebear.types import require_choices


@dataclass(frozen=True)
class Identity:
    """C + λI is the identity: gradients are compared as they are.

    Attributes:
        precision: of the products of all pairs; `"bfloat16"` adds up in float32.
    """

    precision: Precision = "float32"

    def __post_init__(self) -> None:
        require_choices(self)

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> "FittedIdentity":
        """Nothing is estimated: no pass over the data."""
        return FittedIdentity(stream.plan, self.precision)

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> "FittedIdentity":
        """Nothing was saved."""
        return FittedIdentity(stream.plan, self.precision)


@dataclass(frozen=True)
class FittedIdentity:
    """Euclidean products, factored or written out per block, whichever is cheaper."""

    plan: Plan
    precision: Precision = "float32"

    def query_bytes(self, query: Gradients, queries: int) -> int:
        """Written-out matrices where those are cheaper, else factors."""
        total = 0
        for name, block in self.plan.blocks.items():
            t = positions_of(query[name])
            matrix = prefers_matrix(block, t, queries)
            total += 4 * (block.size if matrix else t * (block.rows + block.cols))
        return total

    def prepare(self, queries: Gradients) -> dict[str, QuerySide]:
        """One side a block."""
        sides = {name: query_side(queries[name], b) for name, b in self.plan.blocks.items()}
        if self.precision == "bfloat16":
            sides = {name: side.to(torch.bfloat16) for name, side in sides.items()}
        return sides

    def products(self, prepared: dict[str, QuerySide], train: Gradients) -> Tensor:
        """Inner products of all pairs, `[q, b]`."""
        return products(prepared, train, self.plan)

    def squared_norms(self, gradients: Gradients) -> Tensor:
        """Squared Euclidean norms, `[b]`."""
        blocks = self.plan.blocks.items()
        return torch.stack([squared_norms(gradients[name], b) for name, b in blocks]).sum(0)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def details(self) -> dict[str, Any]:
        """No damping is added."""
        return {}
