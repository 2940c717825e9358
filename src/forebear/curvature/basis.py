"""The eigenbasis of a Kronecker-factored block, and short sums for its inverse eigenvalues."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forebear.blocks import Block
from forebear.curvature.moments import FactorMoments, eigenvectors
from forebear.gradients import (
    WORKSPACE,
    Precision,
    QuerySide,
    cast,
    materialise,
    positions_of,
    rows_of,
    sum_by_row,
)
from forebear.layers import Factors

NEGLIGIBLE = 1e-6  # share of the squared weight that dropped basis vectors may carry


@dataclass(frozen=True)
class Basis:
    """Eigenvectors of the second moments of a block's factors; None stands for the identity."""

    block: Block
    left_vectors: Tensor | None  # [rows, rows]
    right_vectors: Tensor | None  # [cols, cols]
    left_moments: Tensor  # [rows]
    right_moments: Tensor  # [cols]
    positions: float = 1.0  # of an example, on average

    @classmethod
    def of(cls, block: Block, moments: FactorMoments, size: int) -> "Basis":
        """Diagonalise: left moments are per example, right moments per position."""
        left_moments, left_vectors = eigenvectors(moments.left, size)
        right_moments, right_vectors = eigenvectors(moments.right, max(moments.positions, 1))
        positions = moments.positions / size
        return cls(block, left_vectors, right_vectors, left_moments, right_moments, positions)

    @property
    def may_shorten(self) -> bool:
        """Whether a short sum of two terms or more can be cheaper than writing queries out."""
        block = self.block
        ghost = 2 * max(self.positions, 1.0) ** 2 * (block.rows + block.cols)
        return min(block.rows, block.cols) > 1 and block.size > ghost

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

    def add_squares(
        self, total: Tensor, terms: list[Factors], precision: Precision = "float32"
    ) -> None:
        """Add the squared gradients in this basis, summed over examples, to `total`.

        Rounding to bfloat16 adds about 1e-9 of the trace to each, far below any damping.
        """
        if len(terms) == 1 and terms[0].left.shape[1] == 1 and terms[0].left.is_floating_point():
            if precision == "bfloat16":
                squares = [
                    side[:, 0].square()
                    for side in self.narrow().rotate([cast(t, torch.bfloat16) for t in terms])[0]
                ]
                total += squares[0].T @ squares[1]
                return
            left, right = self.rotate(terms)[0]
            total.addmm_(left[:, 0].square().T, right[:, 0].square())
            return
        if is_one_hot(terms):
            _, row, summed = sum_by_row(self.rotate(terms), self.block.rows)
            total.index_add_(0, row, summed.square())
            return
        for matrix in self.matrices(terms):
            total += matrix.square().sum(0)

    def narrow(self) -> "Basis":
        """The same basis in bfloat16."""
        sides = (self.left_vectors, self.right_vectors)
        left, right = (None if side is None else side.to(torch.bfloat16) for side in sides)
        return replace(self, left_vectors=left, right_vectors=right)

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

    `u` is `[r, k]` and `v` is `[r, l]`; the vectors are `[rows, k]` and `[cols, l]`. `error` is the
    relative error, root mean square over pairs of gradients.
    """

    u: Tensor
    v: Tensor
    left_vectors: Tensor
    right_vectors: Tensor
    error: float

    def rotate(self, terms: list[Factors]) -> list[Factors]:
        """Factors in the kept part of the basis."""
        return [
            Factors(left @ self.left_vectors, right @ self.right_vectors) for left, right in terms
        ]

    def narrow(self) -> "ShortSum":
        """The same basis in bfloat16."""
        left, right = self.left_vectors.to(torch.bfloat16), self.right_vectors.to(torch.bfloat16)
        return replace(self, left_vectors=left, right_vectors=right)

    def sides(self, terms: list[Factors], precision: Precision) -> list[QuerySide]:
        """Queries preconditioned by each term of the sum, stacked."""

        def stack(factor: Tensor, by: Tensor) -> Tensor:
            dtype = torch.bfloat16 if precision == "bfloat16" else factor.dtype
            out = factor.new_empty(len(by), *factor.shape, dtype=dtype)
            return torch.mul(factor, by[:, None, None], out=out).flatten(0, 1)

        stacked = [
            Factors(stack(left, self.u), stack(right, self.v)) for left, right in self.rotate(terms)
        ]
        return [QuerySide(terms=stacked, stacked=len(self.u))]


@dataclass(frozen=True)
class _Expansion:
    """All terms that a block's short sum might have, strongest first.

    `squares` `[r]` is what each contributes to the mean square of the block's scores.
    """

    basis: Basis
    rows: Tensor
    cols: Tensor
    one: Tensor
    other: Tensor
    squares: Tensor
    energy: float

    @classmethod
    def of(cls, basis: Basis, inverse: Tensor) -> "_Expansion":
        """Weighted singular vectors of the inverse eigenvalues.

        A score is `Σ_ij inverse_ij · g̃_i g̃'_i · ã_j ã'_j`, so an error in `inverse_ij` counts
        with the squared second moments of the rotated factors g̃_i and ã_j.
        """
        weighted = basis.left_moments[:, None] * inverse * basis.right_moments
        energy = weighted.double().square()
        rows, cols = _heaviest(energy.sum(1)), _heaviest(energy.sum(0))
        small = weighted[rows][:, cols] / energy.max().sqrt().to(weighted.dtype)
        # The smaller Gram matrix has the singular vectors at a fraction of the cost of an SVD.
        wide = len(small) <= small.shape[1]
        squares, vectors = torch.linalg.eigh(small @ small.T if wide else small.T @ small)
        squares, vectors = squares.clamp_min(0).flip(0), vectors.flip(1)
        projected = (small.T if wide else small) @ vectors  # the other side, times the values
        one, other = (vectors, projected) if wide else (projected, vectors)
        scale = energy.max()
        total = float(squares.sum().double() * scale)
        one = one * energy.max().sqrt().to(one.dtype)
        return cls(basis, rows, cols, one, other, squares.double() * scale, total)

    def short_sum(self, terms: int, inverse: Tensor) -> ShortSum:
        """The first `terms` terms."""
        basis = self.basis
        u = self.one[:, :terms].T / basis.left_moments[self.rows]
        v = self.other[:, :terms].T / basis.right_moments[self.cols]
        balance = (v.norm(dim=1) / u.norm(dim=1).clamp_min(1e-30)).sqrt()[:, None]
        rest = self.squares[terms:].sum().item()
        return ShortSum(
            u * balance,
            v / balance,
            _columns(basis.left_vectors, self.rows, inverse),
            _columns(basis.right_vectors, self.cols, inverse),
            (rest / max(self.energy, 1e-300)) ** 0.5,
        )


def short_sums(
    bases: dict[str, Basis], inverses: dict[str, Tensor], rank: int, tolerance: float
) -> dict[str, ShortSum]:
    """Short sums for all blocks with two sides, together within a tolerance.

    Terms are taken where they reduce the error of the summed score most for their cost.

    Args:
        bases: by block.
        inverses: `1 / (Λ + λ)` `[rows, cols]` by block.
        rank: most terms a block.
        tolerance: relative error of the sum over blocks, root mean square over pairs.
    """
    expansions = {
        name: _Expansion.of(bases[name], inverse)
        for name, inverse in inverses.items()
        if bases[name].may_shorten
    }
    names, ranks, squares, prices = [], [], [], []
    for name, expansion in expansions.items():
        kept = min(rank, len(expansion.squares))
        names += [name] * (kept - 1)
        ranks += range(2, kept + 1)
        squares.append(expansion.squares[1:kept])
        prices += [len(expansion.rows) + len(expansion.cols)] * (kept - 1)
    if not expansions:
        return {}
    chosen = dict.fromkeys(expansions, 1)
    error = sum(float(e.squares[1:].sum()) for e in expansions.values())
    allowed = tolerance**2 * sum(e.energy for e in expansions.values())
    value = torch.cat(squares)
    order = torch.argsort(value / torch.tensor(prices, dtype=value.dtype), descending=True)
    for i in order.tolist():
        if error <= allowed:
            break
        chosen[names[i]] = max(chosen[names[i]], ranks[i])
        error -= value[i].item()
    return {name: e.short_sum(chosen[name], inverses[name]) for name, e in expansions.items()}


def is_one_hot(terms: list[Factors]) -> bool:
    """Whether all left factors are integers that stand for one-hot rows."""
    return all(not term.left.is_floating_point() for term in terms)


def _turn(factor: Tensor, vectors: Tensor | None) -> Tensor:
    return factor if vectors is None else factor @ vectors


def _columns(vectors: Tensor | None, keep: Tensor, like: Tensor) -> Tensor:
    if vectors is None:
        vectors = torch.eye(int(keep.max()) + 1, dtype=like.dtype, device=like.device)
    return vectors[:, keep].contiguous()


def _heaviest(energy: Tensor) -> Tensor:
    """Positions left after the lightest, which carry a negligible share together, are dropped."""
    values, order = energy.sort()
    dropped = int((values.cumsum(0) <= NEGLIGIBLE * energy.sum()).sum())
    return order[min(dropped, len(order) - 1) :].sort().values
