"""Two-sided projections: each layer's gradient between two small random matrices.

The gradient of a layer is `Σ_t left_t ⊗ right_t`; projecting its sides first makes a small outer
product, so that nothing of the layer's own size is formed (LoGra: Choe et al. 2024).
"""

from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
from torch import Tensor

from forebear.blocks import Block, Plan
from forebear.capture import Gradients
from forebear.errors import DataError
from forebear.gradients import materialise
from forebear.layers import Factors
from forebear.types import require_choices


@dataclass(frozen=True)
class TwoSided:
    """`L G Rᵀ` of each block's gradient G, with random L and R; blocks stay apart.

    Each block is a part of the result, so that a block-diagonal curvature of the projected
    gradients is one matrix for each layer. Inner products are kept in expectation.

    Attributes:
        dimension: most entries of a block's projected gradient; its sides share it evenly, and a
            side that is shorter is left as long as it is.
        kind: `"orthogonal"` rows, which lose nothing where a side keeps its length, or independent
            `"gaussian"` entries.
    """

    dimension: int = 1024
    kind: Literal["orthogonal", "gaussian"] = "orthogonal"

    def __post_init__(self) -> None:
        require_choices(self)
        if self.dimension < 1:
            raise DataError(f"dimension of TwoSided is {self.dimension}: it must be at least 1")

    def prepare(self, plan: Plan, seed: int) -> "PreparedTwoSided":
        """Draw both sides of every block."""
        generator = torch.Generator().manual_seed(seed)
        left, right = {}, {}
        for name, block in plan.blocks.items():
            rows, cols = self.sides(block)
            left[name] = self._draw(rows, block.rows, generator)
            right[name] = self._draw(cols, block.cols, generator)
        return PreparedTwoSided(plan, left, right)

    def sides(self, block: Block) -> tuple[int, int]:
        """Sides of a block's projected gradient."""
        even = max(1, isqrt(self.dimension))
        rows = min(block.rows, even)
        cols = min(block.cols, self.dimension // rows)
        return min(block.rows, self.dimension // cols), cols

    def _draw(self, short: int, long: int, generator: torch.Generator) -> Tensor:
        """A matrix `[short, long]` whose `MᵀM` is the identity in expectation."""
        drawn = torch.randn(long, short, generator=generator, dtype=torch.float64)
        if self.kind == "gaussian":
            return drawn.T / short**0.5
        if long == short == 1:  # a sign would do, and the one of a written-out vector needs none
            return torch.ones(1, 1, dtype=torch.float64)
        vectors, triangle = torch.linalg.qr(drawn)
        return (vectors * triangle.diagonal().sign()).T * (long / short) ** 0.5


@dataclass(frozen=True)
class PreparedTwoSided:
    """Left `[k, rows]` and right `[l, cols]` matrices by block."""

    plan: Plan
    left: dict[str, Tensor]
    right: dict[str, Tensor]

    @property
    def sizes(self) -> dict[str, int]:
        """One part for each block, `k * l` long."""
        return {name: len(self.left[name]) * len(self.right[name]) for name in self.plan.blocks}

    def features(self, gradients: Gradients) -> Tensor:
        """Projected gradients of all blocks, one after the other, `[b, k]`."""
        parts = []
        for name, block in self.plan.blocks.items():
            left, right = self.left[name], self.right[name]
            small = Block(name, len(left), len(right), block.parameters, block.shapes)
            terms = [_projected(term, left, right) for term in gradients[name]]
            parts.append(materialise(terms, small).flatten(1))
        return torch.cat(parts, 1)


def _projected(term: Factors, left: Tensor, right: Tensor) -> Factors:
    """Both factors between their matrices; one-hot rows pick columns."""
    right = right.to(term.right)
    if term.left.is_floating_point():
        return Factors(term.left @ left.to(term.left).T, term.right @ right.T)
    return Factors(left.to(term.right).T[term.left], term.right @ right.T)
