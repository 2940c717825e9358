"""Inner products of training gradients that are known by their own Gram matrix: the dual form.

With `K = RRᵀ` of the rows R and its eigenvectors U, the coordinates of the training gradients in
their span are `U √μ`: a few numbers each, known before anything is asked. Queries are written in
the same axes by their products with R. No eigenvector of all parameters exists, and no training
gradient is computed a second time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from forebear.blocks import Block, Plan
from forebear.capture import Gradients
from forebear.curvature.damping import Damping
from forebear.curvature.solved import write
from forebear.curvature.spectrum import inverted
from forebear.gradients import WORKSPACE, rows_of

SPAN = "span"
"""The block that coordinates stand in, in place of gradients."""


@dataclass(frozen=True)
class Span:
    """`C = RᵀR / n`: all that does not depend on damping.

    Attributes:
        plan: blocks of the rows.
        rows: R, `[n, P]`.
        weights: of the examples, for TRAK's scores, `[n]`.
        values: eigenvalues of C that are not zero, `[r]`, in double precision.
        turns: eigenvectors of `RRᵀ`, `[n, r]`.
        mean: mean eigenvalue of C.
    """

    plan: Plan
    rows: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    values: Tensor
    turns: Tensor = field(repr=False)
    mean: float

    @property
    def examples(self) -> int:
        """n."""
        return len(self.rows)

    @property
    def coordinates(self) -> Tensor:
        """The training gradients in the axes of their span, `[n, r]`."""
        return self.turns * (self.values * self.examples).sqrt()

    @property
    def coordinate_plan(self) -> Plan:
        """The plan of gradients that are given by coordinates."""
        size = len(self.values)
        block = Block(SPAN, size, 1, (SPAN,), (torch.Size([size]),))
        return Plan({SPAN: block}, (), coverage=self.plan.coverage, verified=True)

    def with_damping(self, damping: Damping) -> "FittedSpan":
        """Inverted.

        Raises:
            TaskError: λ is zero where C is.
        """
        size = self.rows.shape[1]
        value, inverse, base = inverted(self.values, self.mean, size, self.examples, damping)
        return FittedSpan(self, value, inverse, base)

    def inside(self, rows: Tensor) -> Tensor:
        """Coordinates `[m, r]` of vectors `[m, P]`, without what lies outside the span."""
        products = rows.new_zeros(len(rows), self.examples, dtype=torch.float64)
        # Sums of single products in double precision: few directions have nearly all of the length,
        # and rounding of theirs must not reach the others.
        step = max(1, WORKSPACE // self.examples)
        for mine, others in zip(rows.split(step, 1), self.rows.split(step, 1), strict=True):
            products += mine @ others.T
        return products @ (self.turns / (self.values * self.examples).sqrt())

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Vectors `[m, P]` of coordinates `[m, r]`."""
        shares = coordinates @ (self.turns / (self.values * self.examples).sqrt()).T  # [m, n]
        return shares.to(self.rows) @ self.rows


@dataclass(frozen=True)
class FittedSpan:
    """`(C + λI)⁻¹` in the axes of the span: `inverse` on them, the number `base` outside.

    Gradients of training examples are coordinates in the block `SPAN`; any others are whole.
    """

    span: Span
    damping: float
    inverse: Tensor
    base: float

    def with_damping(self, damping: Damping) -> "FittedSpan":
        """The same curvature with another damping; its axes are kept."""
        return self.span.with_damping(damping)

    def query_bytes(self, query: Gradients, queries: int) -> int:
        """One dense gradient, which is written out on its way into the span."""
        return self.span.rows.element_size() * self.span.rows.shape[1]

    def prepare(self, queries: Gradients) -> Tensor:
        """Solved coordinates `[q, r]`."""
        return self.coordinates(queries) * self.inverse

    def products(self, prepared: Tensor, train: Gradients) -> Tensor:
        """Inner products of all pairs, `[q, b]`; training gradients lie in the span."""
        return (prepared @ self.coordinates(train).T).to(self.span.rows.dtype)

    def squared_norms(self, gradients: Gradients) -> Tensor:
        """`gᵀ (C + λI)⁻¹ g`, `[b]`."""
        if SPAN in gradients or self.base == 0:
            norms = self.coordinates(gradients).square() @ self.inverse
            return norms.to(self.span.rows.dtype)
        norms = []
        for rows in _written(gradients, self.span.plan):
            inside, outside = self._parts(rows)
            norms.append(inside.square() @ self.inverse + self.base * outside.square().sum(1))
        return torch.cat(norms).to(self.span.rows.dtype)

    def coordinates(self, gradients: Gradients) -> Tensor:
        """`[b, r]`, without what lies outside the span."""
        if SPAN in gradients:
            return gradients[SPAN][0].left[:, 0]
        return torch.cat([self.span.inside(rows) for rows in _written(gradients, self.span.plan)])

    def solve(self, rows: Tensor) -> Tensor:
        """`(C + λI)⁻¹` applied to coordinates `[m, r]`, or to vectors `[m, P]`.

        The axes are orthonormal: what is solved is as long in coordinates as it is in parameters.
        """
        if rows.shape[1] == len(self.inverse):  # there are always fewer than parameters
            return rows * self.inverse
        inside, outside = self._parts(rows)
        return self.span.vectors(inside * self.inverse).add_(outside, alpha=self.base)

    def tensors(self) -> dict[str, Tensor]:
        """Rows, and what turns them into axes."""
        span = self.span
        return {
            "rows": span.rows,
            "row_weights": span.weights,
            "eigenvalues": span.values,
            "turns": span.turns,
            "inverse": self.inverse,
            "scalars": torch.tensor([self.damping, self.base, span.mean], dtype=torch.float64),
        }

    def details(self) -> dict[str, Any]:
        """One λ for all, and how many eigenvectors there are."""
        return {"damping_used": {"all": self.damping}, "eigenvectors": len(self.inverse)}

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates `[m, r]` and what is left of `[m, P]`, made orthogonal twice.

        What is left is divided by the damping alone, which would blow up rounding.
        """
        first = self.span.inside(rows)
        outside = rows - self.span.vectors(first)
        again = self.span.inside(outside)
        return first + again, outside.sub_(self.span.vectors(again))


def _written(gradients: Gradients, plan: Plan) -> Iterator[Tensor]:
    """Gradients written out over all blocks, `[c, P]`, some at a time."""
    size = sum(block.size for block in plan.blocks.values())
    like = next(iter(gradients.values()))[0].right
    step = max(1, 4 * WORKSPACE // size)
    for start in range(0, len(like), step):
        rows = slice(start, start + step)
        out = like.new_empty(len(like[rows]), size)
        write({name: rows_of(terms, rows) for name, terms in gradients.items()}, plan, out)
        yield out


def restored_span(plan: Plan, tensors: dict[str, Tensor]) -> FittedSpan:
    """What `FittedSpan.tensors` described."""
    damping, base, mean = tensors["scalars"].tolist()
    span = Span(
        plan,
        tensors["rows"],
        tensors["row_weights"],
        tensors["eigenvalues"],
        tensors["turns"],
        mean,
    )
    return FittedSpan(span, damping, tensors["inverse"], base)
