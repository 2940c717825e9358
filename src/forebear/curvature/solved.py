"""Inner products of a curvature that can be applied to written-out vectors."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Gradients
from forebear.gradients import Precision, QuerySide, materialise, products, rows_of
from forebear.layers import vector

PIECE = 2**20
"""Entries that are written out at a time (4 MB of float32)."""


class Solved(ABC):
    """`pᵀ (C + λI)⁻¹ q` where the queries are solved for once, written out.

    Training gradients stay factored: only the queries are ever vectors of all P parameters. A
    subclass supplies `solve`; rows are the blocks of the plan one after the other, each written out
    row by row.
    """

    plan: Plan
    precision: Precision = "float32"

    @abstractmethod
    def solve(self, rows: Tensor) -> Tensor:
        """`(C + λI)⁻¹` applied to each row of `[m, P]`."""

    def query_bytes(self, query: Gradients, queries: int) -> int:
        """One dense gradient."""
        return 4 * sum(block.size for block in self.plan.blocks.values())

    def prepare(self, queries: Gradients) -> dict[str, QuerySide]:
        """Solved queries, cut into blocks."""
        solved = self.solve(torch.cat(list(flat(queries, self.plan))))
        sides = sides_of(solved, self.plan)
        if self.precision == "bfloat16":
            sides = {name: side.to(torch.bfloat16) for name, side in sides.items()}
        return sides

    def products(self, prepared: dict[str, QuerySide], train: Gradients) -> Tensor:
        """Inner products of all pairs, `[q, b]`."""
        return products(prepared, train, self.plan)

    def squared_norms(self, gradients: Gradients) -> Tensor:
        """`gᵀ (C + λI)⁻¹ g`, `[b]`."""
        return torch.cat([(self.solve(g) * g).sum(1) for g in flat(gradients, self.plan)])


def sides_of(rows: Tensor, plan: Plan) -> dict[str, QuerySide]:
    """Written-out vectors `[m, P]` as the query's side of products, by block."""
    sides = {}
    pieces = rows.split([block.size for block in plan.blocks.values()], 1)
    for (name, block), piece in zip(plan.blocks.items(), pieces, strict=True):
        if block.cols == 1:
            sides[name] = QuerySide(terms=[vector(piece.contiguous())])
        else:
            sides[name] = QuerySide(matrix=piece.reshape(-1, block.rows, block.cols))
    return sides


def flat(gradients: Gradients, plan: Plan) -> Iterator[Tensor]:
    """Gradients written out over all blocks, `[c, P]`."""
    if len(plan.blocks) == 1:  # projected gradients are as they should be
        (name, block), *_ = plan.blocks.items()
        yield materialise(gradients[name], block).flatten(1)
        return
    blocks = plan.blocks.items()
    yield torch.cat([materialise(gradients[name], block).flatten(1) for name, block in blocks], 1)


def write(gradients: Gradients, plan: Plan, out: Tensor) -> None:
    """Gradients written out over all blocks into `[b, P]`.

    A few at a time: what is written out stays in the cache until it is copied.
    """
    first = 0
    for name, block in plan.blocks.items():
        step = max(1, PIECE // block.size)
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            part = materialise(rows_of(gradients[name], rows), block)
            out[rows, first : first + block.size] = part.flatten(1)
        first += block.size
