"""Kronecker-factored curvature of each block: K-FAC and EK-FAC.

For a block with gradients `Σ_t left_t ⊗ right_t` the Gauss-Newton block is approximated in the
basis `Q_L ⊗ Q_R` of the eigenvectors of the factors' second moments. K-FAC (Martens & Grosse 2015)
takes the products of their eigenvalues; EK-FAC (George et al. 2018) measures the second moments Λ
of the gradients in that basis, `Λ = mean (Q_Lᵀ G Q_R)²`.

The inverse `1 / (Λ + λ)` is an elementwise product in the basis, which does not act on factors. For
all pairs it is approximated by a short sum of outer products `Σ_r u_r v_rᵀ`, found by a singular
value decomposition *weighted with the second moments* of the rotated factors, and basis vectors
that carry no weight are dropped. `rank=None` contracts exactly instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from forebear.blocks import Block, Plan
from forebear.capture import Function, Gradients
from forebear.curvature.base import GradientStream
from forebear.curvature.damping import Damping
from forebear.curvature.moments import FactorMoments, eigenvectors
from forebear.errors import TaskError
from forebear.gradients import (
    WORKSPACE,
    QuerySide,
    add_products,
    materialise,
    positions_of,
    rows_of,
    sum_by_row,
)
from forebear.layers import Factors

MAX_DIMENSION = 8192
"""Sides longer than this get a diagonal second moment: their eigenvectors would not fit."""


@dataclass(frozen=True, kw_only=True)
class Kronecker:
    """K-FAC or EK-FAC.

    Attributes:
        corrected: measure the eigenvalues (EK-FAC) instead of multiplying the factors' (K-FAC).
        targets: `"sampled"` from the model's prediction, which gives the Gauss-Newton matrix of
            the usual losses, or `"empirical"`: the training labels.
        tolerance: relative error allowed to the low-rank inverse, root mean square over pairs.
        rank: most terms of the low-rank inverse; None contracts exactly.
    """

    corrected: bool = True
    targets: Literal["sampled", "empirical"] = "sampled"
    tolerance: float = 0.02
    rank: int | None = 32

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> "FittedKronecker":
        """One pass for the factors' moments and, for EK-FAC, one for the eigenvalues."""
        function = self._function(stream, function, seed)
        moments: dict[str, FactorMoments] = {}
        for _, _, gradients in stream.gradients(function, "curvature factors"):
            for name, block in stream.plan.blocks.items():
                if name not in moments:
                    moments[name] = FactorMoments.start(block, gradients[name], MAX_DIMENSION)
                moments[name].add(gradients[name])
        size = len(stream.data)
        bases = {}
        for name, block in stream.plan.blocks.items():
            bases[name] = Basis.of(block, moments.pop(name), size)  # frees the moments
        if self.corrected:
            eigenvalues = self._measured(stream, function, bases)
        else:
            eigenvalues = {name: basis.product() for name, basis in bases.items()}
        blocks = {}
        for name, basis in bases.items():
            value = damping.value(eigenvalues[name].mean().item())
            blocks[name] = self._block(basis, eigenvalues[name], value)
        return FittedKronecker(stream.plan, blocks)

    def restore(self, plan: Plan, tensors: dict[str, Tensor]) -> "FittedKronecker":
        """From saved bases, eigenvalues and damping."""
        blocks = {}
        for name, block in plan.blocks.items():
            parts = {
                key.rpartition("/")[2]: value
                for key, value in tensors.items()
                if key.rpartition("/")[0] == name
            }
            basis = Basis(
                block,
                parts.get("left_vectors"),
                parts.get("right_vectors"),
                parts["left_moments"],
                parts["right_moments"],
            )
            value = parts["damping"].item()
            blocks[name] = self._block(basis, parts["eigenvalues"], value)
        return FittedKronecker(plan, blocks)

    def _function(self, stream: GradientStream, function: Function, seed: int) -> Function:
        if self.targets == "empirical":
            return function
        objective = stream.task.objective
        generator = torch.Generator(stream.task.device).manual_seed(seed)
        if not stream.plan.fallback:
            return lambda model, batch: objective.sampled(model, batch, generator)

        def sampled(model: Any, batch: Any) -> Tensor:
            # The fallback differentiates the batch a second time, with the same targets.
            state = generator.get_state()
            with torch.no_grad():
                outputs = objective.outputs(model, batch)
            drawn = objective.sample(outputs, batch, generator)
            generator.set_state(state)
            return objective(model, drawn)

        return sampled

    def _measured(
        self, stream: GradientStream, function: Function, bases: dict[str, "Basis"]
    ) -> dict[str, Tensor]:
        totals = {name: basis.empty() for name, basis in bases.items()}
        for _, _, gradients in stream.gradients(function, "curvature eigenvalues"):
            for name, basis in bases.items():
                basis.add_squares(totals[name], gradients[name])
        return {name: total.div_(len(stream.data)) for name, total in totals.items()}

    def _block(self, basis: "Basis", eigenvalues: Tensor, damping: float) -> "KroneckerBlock":
        if not eigenvalues.any() and damping == 0.0:
            raise TaskError(
                f"block {basis.block.name!r} has no curvature (its gradients are all zero) and the "
                "damping is zero: exclude it with layers=, or use damping=fb.Absolute(...)"
            )
        inverse = 1.0 / (eigenvalues + damping)
        short = None
        if self.rank is not None and min(inverse.shape) > 1:
            short = ShortSum.of(basis, inverse, self.rank, self.tolerance)
        return KroneckerBlock(basis, eigenvalues, inverse, damping, short)


@dataclass(frozen=True)
class Basis:
    """Eigenvectors of the second moments of a block's factors; None stands for the identity."""

    block: Block
    left_vectors: Tensor | None  # [rows, rows]
    right_vectors: Tensor | None  # [cols, cols]
    left_moments: Tensor  # [rows]
    right_moments: Tensor  # [cols]

    @classmethod
    def of(cls, block: Block, moments: FactorMoments, size: int) -> "Basis":
        """Diagonalise: left moments are per example, right moments per position."""
        left_moments, left_vectors = eigenvectors(moments.left, size)
        right_moments, right_vectors = eigenvectors(moments.right, max(moments.positions, 1))
        return cls(block, left_vectors, right_vectors, left_moments, right_moments)

    def product(self) -> Tensor:
        """K-FAC's eigenvalues, `[rows, cols]`."""
        return torch.outer(self.left_moments, self.right_moments)

    def empty(self) -> Tensor:
        """Zeros for the eigenvalues, `[rows, cols]`."""
        return self.left_moments.new_zeros(self.block.rows, self.block.cols)

    def rotate(self, terms: list[Factors]) -> list[Factors]:
        """Factors in this basis."""
        return [
            Factors(_turn(left, self.left_vectors), _turn(right, self.right_vectors))
            for left, right in terms
        ]

    def rotate_matrix(self, matrix: Tensor, back: bool = False) -> Tensor:
        """`[b, rows, cols]` into this basis, or back out of it."""
        if self.left_vectors is not None:
            matrix = (self.left_vectors if back else self.left_vectors.T) @ matrix
        if self.right_vectors is not None:
            matrix = matrix @ (self.right_vectors.T if back else self.right_vectors)
        return matrix

    def add_squares(self, total: Tensor, terms: list[Factors]) -> None:
        """Add the squared gradients in this basis, summed over examples, to `total`."""
        if len(terms) == 1 and terms[0].left.shape[1] == 1 and terms[0].left.is_floating_point():
            left, right = self.rotate(terms)[0]
            total.addmm_(left[:, 0].square().T, right[:, 0].square())
            return
        if _one_hot(terms):
            _, row, summed = sum_by_row(self.rotate(terms), self.block.rows)
            total.index_add_(0, row, summed.square())
            return
        for matrix in self.matrices(terms):
            total += matrix.square().sum(0)

    def matrices(self, terms: list[Factors]) -> Iterator[Tensor]:
        """Gradients in this basis written out, some examples at a time, `[c, rows, cols]`."""
        rows, cols = self.block.rows, self.block.cols
        factors_first = positions_of(terms) * (rows**2 + cols**2) < self.block.size * (rows + cols)
        step = max(1, WORKSPACE // self.block.size)
        for start in range(0, len(terms[0].right), step):
            some = rows_of(terms, slice(start, start + step))
            if factors_first:
                yield materialise(self.rotate(some), self.block)
            else:
                yield self.rotate_matrix(materialise(some, self.block))


@dataclass(frozen=True)
class ShortSum:
    """`1 / (Λ + λ) ≈ Σ_r u_r v_rᵀ` on the basis vectors that carry weight.

    `u` is `[r, k]` and `v` is `[r, l]`; the vectors are `[rows, k]` and `[cols, l]`.
    """

    u: Tensor
    v: Tensor
    left_vectors: Tensor
    right_vectors: Tensor

    @classmethod
    def of(cls, basis: Basis, inverse: Tensor, rank: int, tolerance: float) -> "ShortSum":
        """Weighted low-rank approximation.

        A score is `Σ_ij inverse_ij · g̃_i g̃'_i · ã_j ã'_j`, so an error in `inverse_ij` counts
        with the squared second moments of the rotated factors g̃_i and ã_j.
        """
        left, right = basis.left_moments.double(), basis.right_moments.double()
        weighted = left[:, None] * inverse.double() * right[None]
        energy = weighted.square()
        allowed = tolerance**2 * energy.sum()
        keep_rows = _heaviest(energy.sum(1), 0.25 * allowed)
        keep_cols = _heaviest(energy.sum(0), 0.25 * allowed)
        small = weighted[keep_rows][:, keep_cols]
        u, s, vh = torch.linalg.svd(small, full_matrices=False)
        tail = s.square().flip(0).cumsum(0).flip(0)  # energy from the r-th term on
        terms = int((tail > 0.5 * allowed).sum().clamp(1, rank))
        u = (u[:, :terms] * s[:terms].sqrt()).T / left[keep_rows]
        v = (vh[:terms].T * s[:terms].sqrt()).T / right[keep_cols]
        return cls(
            u.to(inverse.dtype),
            v.to(inverse.dtype),
            _columns(basis.left_vectors, keep_rows, inverse),
            _columns(basis.right_vectors, keep_cols, inverse),
        )

    def rotate(self, terms: list[Factors]) -> list[Factors]:
        """Factors in the kept part of the basis."""
        return [
            Factors(left @ self.left_vectors, right @ self.right_vectors) for left, right in terms
        ]

    def sides(self, terms: list[Factors]) -> list[QuerySide]:
        """Queries preconditioned by each term of the sum."""
        rotated = self.rotate(terms)
        return [
            QuerySide(terms=[Factors(left * u, right * v) for left, right in rotated])
            for u, v in zip(self.u, self.v, strict=True)
        ]


@dataclass(frozen=True)
class PreparedBlock:
    """Preconditioned queries of a block and the basis in which training gradients meet them."""

    sides: list[QuerySide]
    basis: Basis | ShortSum | None


@dataclass(frozen=True)
class KroneckerBlock:
    """One block's inverse curvature."""

    basis: Basis
    eigenvalues: Tensor
    inverse: Tensor
    damping: float
    short: ShortSum | None = field(repr=False)

    def uses_matrix(self, query: list[Factors], queries: int) -> bool:
        """Whether the queries are written out: always when exactness was asked for."""
        block = self.basis.block
        if _one_hot(query):
            return False
        if self.short is None or not _all_floating(query):
            return block.cols > 1
        t = positions_of(query)
        kept = self.short.u.shape[1] + self.short.v.shape[1]
        ghost = len(self.short.u) * t**2 * (kept + 8)
        return block.size * (1 + t / max(queries, 1)) < ghost

    def prepare(self, terms: list[Factors]) -> PreparedBlock:
        """Precondition queries."""
        if _one_hot(terms) or (self.basis.block.cols == 1 and _all_floating(terms)):
            rotated = self.basis.rotate(terms)
            return PreparedBlock([QuerySide(terms=self._scaled(rotated))], self.basis)
        if not self.uses_matrix(terms, len(terms[0].right)):
            assert self.short is not None
            return PreparedBlock(self.short.sides(terms), self.short)
        pieces = [
            self.basis.rotate_matrix(matrix * self.inverse, back=True)
            for matrix in self.basis.matrices(terms)
        ]
        return PreparedBlock([QuerySide(matrix=torch.cat(pieces))], None)

    def _scaled(self, rotated: list[Factors]) -> list[Factors]:
        """The inverse acts exactly on one-hot rows and on vectors."""
        scaled = []
        for left, right in rotated:
            if left.is_floating_point():
                scaled.append(Factors(left * self.inverse[:, 0], right))
            else:
                scaled.append(Factors(left, right * self.inverse[left]))
        return scaled

    def squared_norms(self, terms: list[Factors]) -> Tensor:
        """`gᵀ (C + λI)⁻¹ g`, `[b]`, exactly."""
        if len(terms) == 1 and terms[0].left.shape[1] == 1 and terms[0].left.is_floating_point():
            left, right = self.basis.rotate(terms)[0]
            weighted = left[:, 0].square() @ self.inverse  # [b, cols]
            return (weighted * right[:, 0].square()).sum(1)
        if _one_hot(terms):
            rotated = self.basis.rotate(terms)
            example, row, summed = sum_by_row(rotated, self.basis.block.rows)
            norms = (summed.square() * self.inverse[row]).sum(1)
            return norms.new_zeros(len(rotated[0].right)).index_add_(0, example, norms)
        parts = [
            torch.einsum("brc,rc->b", matrix.square(), self.inverse)
            for matrix in self.basis.matrices(terms)
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class FittedKronecker:
    """Block-diagonal inner product."""

    plan: Plan
    blocks: dict[str, KroneckerBlock]

    def query_bytes(self, query: Gradients, queries: int) -> int:
        """Bytes of one prepared query."""
        total = 0
        for name, block in self.blocks.items():
            shape = block.basis.block
            if block.uses_matrix(query[name], queries):
                total += 4 * shape.size
            else:
                ranks = len(block.short.u) if block.short else 1
                total += 4 * ranks * positions_of(query[name]) * (shape.rows + shape.cols)
        return total

    def prepare(self, queries: Gradients) -> dict[str, PreparedBlock]:
        """Preconditioned queries by block."""
        return {name: block.prepare(queries[name]) for name, block in self.blocks.items()}

    def products(self, prepared: dict[str, PreparedBlock], train: Gradients) -> Tensor:
        """Inner products of all pairs, `[q, b]`."""
        out: Tensor | None = None
        for name, ready in prepared.items():
            terms = ready.basis.rotate(train[name]) if ready.basis is not None else train[name]
            if out is None:
                side = ready.sides[0]
                like = side.matrix if side.matrix is not None else side.terms[0].right  # type: ignore[index]
                out = like.new_zeros(len(like), len(train[name][0].right))
            for side in ready.sides:
                add_products(out, side, terms, self.plan.blocks[name])
        assert out is not None
        return out

    def squared_norms(self, gradients: Gradients) -> Tensor:
        """`gᵀ (C + λI)⁻¹ g`, `[b]`."""
        blocks = self.blocks.items()
        return torch.stack([block.squared_norms(gradients[name]) for name, block in blocks]).sum(0)

    def tensors(self) -> dict[str, Tensor]:
        """Bases, eigenvalues and damping by block."""
        out: dict[str, Tensor] = {}
        for name, block in self.blocks.items():
            basis = block.basis
            parts = {
                "left_vectors": basis.left_vectors,
                "right_vectors": basis.right_vectors,
                "left_moments": basis.left_moments,
                "right_moments": basis.right_moments,
                "eigenvalues": block.eigenvalues,
                "damping": torch.tensor(block.damping, dtype=torch.float64),
            }
            out |= {f"{name}/{key}": value for key, value in parts.items() if value is not None}
        return out

    def damping_used(self) -> dict[str, float]:
        """λ of each block."""
        return {name: block.damping for name, block in self.blocks.items()}


def _turn(factor: Tensor, vectors: Tensor | None) -> Tensor:
    return factor if vectors is None else factor @ vectors


def _columns(vectors: Tensor | None, keep: Tensor, like: Tensor) -> Tensor:
    if vectors is None:
        size = int(keep.max()) + 1
        vectors = torch.eye(size, dtype=like.dtype, device=like.device)
    return vectors[:, keep].contiguous()


def _heaviest(energy: Tensor, allowed: Tensor) -> Tensor:
    """Positions left after the lightest, whose energies sum to at most `allowed`, are dropped."""
    values, order = energy.sort()
    dropped = int((values.cumsum(0) <= allowed).sum())
    return order[min(dropped, len(order) - 1) :].sort().values


def _one_hot(terms: list[Factors]) -> bool:
    return all(not term.left.is_floating_point() for term in terms)


def _all_floating(terms: list[Factors]) -> bool:
    return all(term.left.is_floating_point() for term in terms)
