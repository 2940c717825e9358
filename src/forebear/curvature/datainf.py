"""DataInf: the mean of inverses in place of the inverse of the mean, each one by Sherman-Morrison.

For a block with training gradients g_k, `(C + λI)⁻¹` with `C = (1/n) Σ g_k g_kᵀ` is replaced by
`(1/n) Σ (g_k g_kᵀ + λI)⁻¹ = (1/λ) [I − (1/n) Σ g_k g_kᵀ / (λ + ‖g_k‖²)]` (Kwon et al. 2024). All
pairs need only Gram matrices of gradients, which come from factors.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from forebear.blocks import Block, Plan
from forebear.capture import Gradients
from forebear.curvature.base import GradientStream
from forebear.curvature.damping import Damping
from forebear.differentiation import Function
from forebear.errors import TaskError
from forebear.gradients import (
    Precision,
    QuerySide,
    add_products,
    joined,
    materialise,
    positions_of,
    query_side,
    rows_of,
    squared_norms,
)
from forebear.layers import Factors, vector
from forebear.types import require_choices

KEPT_BYTES = 2**30
"""Factors of the examples that make up C may take 1 GB."""


@dataclass(frozen=True, kw_only=True)
class DataInf:
    """The empirical Fisher matrix of each block, inverted example by example.

    Attributes:
        samples: examples that C is made of, drawn at random; all when None.
        precision: of the products of all pairs; `"bfloat16"` adds up in float32.
    """

    samples: int | None = None
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        require_choices(self)

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> "FittedDataInf":
        """Keep the factors of the sampled gradients; damping is measured on all.

        Raises:
            TaskError: they do not fit into `KEPT_BYTES`, a block has neither gradient nor damping,
                or the damping is a rule about eigenvalues.
        """
        size = len(stream.data)
        chosen = torch.arange(size)
        if self.samples is not None and self.samples < size:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(size, generator=generator)[: self.samples].sort().values
        kept, totals = self._kept(stream, function, chosen)
        means = {
            name: totals[name] / size / block.size for name, block in stream.plan.blocks.items()
        }
        return self._fitted(stream.plan, kept, chosen, means).with_damping(damping)

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> "FittedDataInf":
        """From the saved positions; the gradients are computed again in one pass."""
        kept, _ = self._kept(stream, function, tensors["chosen"])
        names = list(stream.plan.blocks)
        means = dict(zip(names, tensors["means"].tolist(), strict=True))
        used = dict(zip(names, tensors["damping"].tolist(), strict=True))
        return replace(self._fitted(stream.plan, kept, tensors["chosen"], means), damping=used)

    def _fitted(
        self, plan: Plan, kept: Gradients, chosen: Tensor, means: dict[str, float]
    ) -> "FittedDataInf":
        norms = {name: squared_norms(kept[name], block) for name, block in plan.blocks.items()}
        return FittedDataInf(plan, kept, norms, chosen, means, {}, self.precision)

    def _kept(
        self, stream: GradientStream, function: Function, chosen: Tensor
    ) -> tuple[Gradients, dict[str, float]]:
        """Gradients of the chosen examples, and the sum of all squared norms by block."""
        parts: list[Gradients] = []
        totals = dict.fromkeys(stream.plan.blocks, 0.0)
        room, start = KEPT_BYTES, 0
        for _, _, gradients in stream.gradients(function, "gradients"):
            size = len(next(iter(gradients.values()))[0].right)
            here = chosen[(chosen >= start) & (chosen < start + size)] - start
            start += size
            for name, block in stream.plan.blocks.items():
                totals[name] += squared_norms(gradients[name], block).sum().item()
            if not len(here):
                continue
            part = gradients
            if len(here) < size:
                part = {name: _some(terms, here) for name, terms in gradients.items()}
            parts.append(part)
            room -= sum(side.nbytes for terms in part.values() for term in terms for side in term)
            if room < 0:
                raise TaskError(
                    f"gradients of {len(chosen)} examples do not fit into "
                    f"{KEPT_BYTES / 2**30:.0f} GB even as factors: let DataInf draw fewer with "
                    "samples=1000"
                )
        return joined(parts), totals


@dataclass(frozen=True)
class PreparedBlock:
    """Queries of a block, and how much each meets every kept gradient, `[q, s]`.

    Without `weights` the side is written out and has been solved for.
    """

    side: QuerySide
    weights: Tensor | None


@dataclass(frozen=True)
class FittedDataInf:
    """Kept gradients G of s examples, by block.

    Attributes:
        plan: blocks.
        kept: factored gradients of the chosen examples.
        norms: their squared norms `[s]` by block.
        chosen: their positions `[s]`.
        means: mean eigenvalue of each block's empirical Fisher matrix.
        damping: λ of each block.
        precision: of the products of all pairs.
    """

    plan: Plan
    kept: Gradients = field(repr=False)
    norms: dict[str, Tensor] = field(repr=False)
    chosen: Tensor = field(repr=False)
    means: dict[str, float]
    damping: dict[str, float]
    precision: Precision = "float32"

    def with_damping(self, damping: Damping) -> "FittedDataInf":
        """The same gradients with another damping.

        Raises:
            TaskError: λ of a block is zero.
        """
        used = {name: damping.value(mean) for name, mean in self.means.items()}
        for name, value in used.items():
            if not value > 0:
                raise TaskError(
                    f"block {name!r} has damping zero, and DataInf divides by it: its mean squared "
                    f"gradient is {self.means[name]:.3g}; use damping=fb.Absolute(...) above zero, "
                    "or exclude it with layers="
                )
        return replace(self, damping=used)

    def query_bytes(self, query: Gradients, queries: int) -> int:
        """Factors or a written-out gradient, and one weight for each kept gradient."""
        total = 0
        for name, block in self.plan.blocks.items():
            factors = positions_of(query[name]) * (block.rows + block.cols)
            total += 4 * max(min(factors, block.size) + len(self.chosen), block.size)
        return total

    def prepare(self, queries: Gradients) -> dict[str, PreparedBlock]:
        """Meet all kept gradients, once."""
        return {
            name: self._prepare(name, block, queries[name])
            for name, block in self.plan.blocks.items()
        }

    def products(self, prepared: dict[str, PreparedBlock], train: Gradients) -> Tensor:
        """Inner products of all pairs, `[q, b]`."""
        like = next(iter(train.values()))[0].right
        queries = len(next(iter(prepared.values())).side)
        out = like.new_zeros(queries, len(like))
        for name, block in self.plan.blocks.items():
            ready = prepared[name]
            part = like.new_zeros(queries, len(like))
            add_products(part, ready.side, train[name], block)
            if ready.weights is not None:
                gram = self._gram(name, block, train[name])  # [s, b]
                part = part.addmm_(ready.weights, gram, alpha=-1.0).div_(self.damping[name])
            out += part
        return out

    def squared_norms(self, gradients: Gradients) -> Tensor:
        """`gᵀ` times the preconditioned g, `[b]`."""
        total: Tensor | None = None
        for name, block in self.plan.blocks.items():
            gram = self._gram(name, block, gradients[name])  # [s, b]
            norms = squared_norms(gradients[name], block)
            norms = (norms - self._shrink(name) @ gram.square()) / self.damping[name]
            total = norms if total is None else total + norms
        assert total is not None
        return total

    def solve(self, rows: Tensor) -> Tensor:
        """The mean of inverses applied to each row of `[m, P]`."""
        pieces = rows.split([block.size for block in self.plan.blocks.values()], 1)
        solved = []
        for (name, block), piece in zip(self.plan.blocks.items(), pieces, strict=True):
            side = _written(piece, block)
            solved.append(self._solved(name, block, side, piece))
        return torch.cat(solved, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Which examples were kept, and numbers by block; the gradients are computed again."""
        return {
            "chosen": self.chosen,
            "means": torch.tensor(list(self.means.values()), dtype=torch.float64),
            "damping": torch.tensor(list(self.damping.values()), dtype=torch.float64),
        }

    def details(self) -> dict[str, Any]:
        """λ of each block and the number of examples that C is made of."""
        return {"damping_used": self.damping, "samples_used": len(self.chosen)}

    def _prepare(self, name: str, block: Block, terms: list[Factors]) -> PreparedBlock:
        queries, positions = len(terms[0].right), positions_of(terms)
        samples = len(self.chosen)
        # Meeting the kept gradients again for every training example, or solving for the query.
        again = samples * (positions**2 * (block.rows + block.cols) + queries)
        if queries * block.size < again and terms[0].left.is_floating_point():
            rows = materialise(terms, block).flatten(1)
            solved = self._solved(name, block, QuerySide(terms=terms), rows)
            return PreparedBlock(self._narrow(_written(solved, block)), None)
        side = query_side(terms, block)
        return PreparedBlock(self._narrow(side), self._weights(name, block, side))

    def _narrow(self, side: QuerySide) -> QuerySide:
        return side.to(torch.bfloat16) if self.precision == "bfloat16" else side

    def _solved(self, name: str, block: Block, side: QuerySide, rows: Tensor) -> Tensor:
        """`(1/λ) [v − Gᵀ w]` of each row of `[m, rows * cols]`."""
        weights = self._weights(name, block, side)
        return (rows - combined(weights, self.kept[name], block)) / self.damping[name]

    def _weights(self, name: str, block: Block, side: QuerySide) -> Tensor:
        """`(1/s) (g_k · v) / (λ + ‖g_k‖²)`, `[m, s]`."""
        norms = self.norms[name]
        met = norms.new_zeros(len(side), len(norms))
        add_products(met, side, self.kept[name], block)
        return met * self._shrink(name)

    def _shrink(self, name: str) -> Tensor:
        return 1.0 / (self.norms[name] + self.damping[name]) / len(self.chosen)

    def _gram(self, name: str, block: Block, terms: list[Factors]) -> Tensor:
        """Products of kept gradients and others, `[s, b]`."""
        kept = self.kept[name]
        gram = self.norms[name].new_zeros(len(self.chosen), len(terms[0].right))
        side = query_side(kept, block)
        add_products(gram, side, terms, block)
        return gram


def combined(weights: Tensor, terms: list[Factors], block: Block) -> Tensor:
    """Sums `Σ_k w_k g_k` of factored gradients, written out, `[m, rows * cols]`."""
    total = weights.new_zeros(len(weights), block.rows, block.cols)
    for left, right in terms:
        if not left.is_floating_point():
            for row, weight in enumerate(weights):
                scaled = (right * weight[:, None, None]).flatten(0, 1)
                total[row].index_add_(0, left.flatten(), scaled)
            continue
        flat_left, flat_right = left.flatten(0, 1), right.flatten(0, 1)  # [s * t, ...]
        spread = weights.repeat_interleave(left.shape[1], 1)  # [m, s * t]
        if block.cols == 1:
            total += (spread @ (flat_left * flat_right))[:, :, None]
            continue
        # The shorter side takes the weights, and all rows of weights go through one product.
        if block.rows <= block.cols:
            scaled = torch.einsum("mk,kr->mrk", spread, flat_left).flatten(0, 1)
            total += (scaled @ flat_right).view_as(total)
        else:
            scaled = torch.einsum("mk,kc->mck", spread, flat_right).flatten(0, 1)
            total += (scaled @ flat_left).view(len(weights), block.cols, block.rows).mT
    return total.flatten(1)


def _written(rows: Tensor, block: Block) -> QuerySide:
    """Written-out gradients `[m, rows * cols]` as a side of products."""
    if block.cols == 1:
        return QuerySide(terms=[vector(rows.contiguous())])
    return QuerySide(matrix=rows.reshape(-1, block.rows, block.cols))


def _some(terms: list[Factors], rows: Tensor) -> list[Factors]:
    return rows_of(terms, rows)  # type: ignore[arg-type]
