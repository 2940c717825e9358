"""Arithmetic on factored per-example gradients: products, norms and, where cheaper, matrices.

The gradient of an example is `Σ_t left_t ⊗ right_t` and stays factored. For one position the inner
product of two gradients is `(left·left')(right·right')`: two thin matrix products for all pairs
instead of one huge one ("ghost" product). With many positions t the ghost product costs t² and a
written-out matrix may be cheaper; `query_side` chooses from the shapes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from forebear.blocks import Block, Plan
from forebear.capture import Gradients
from forebear.errors import TaskError
from forebear.layers import Factors, is_one, is_written, written_out

Precision = Literal["float32", "bfloat16"]
"""Of the products of all pairs. Models in float64 keep float64 unless it is bfloat16."""

WORKSPACE = 2**23
"""Entries of the largest temporary (32 MB of float32)."""

STACK_WORKSPACE = 2**21
"""The same where many products are added up: small enough for the cache."""

GHOST_OVERHEAD = 24  # elementwise work of a ghost product per pair of positions, in multiply-adds


def materialise(terms: list[Factors], block: Block) -> Tensor:
    """Gradients written out, `[b, rows, cols]`."""
    total: Tensor | None = None
    for left, right in terms:
        if left.is_floating_point():
            part = _outer(left, right)
        elif is_written(Factors(left, right), block.rows):
            part = right
        else:
            part = right.new_zeros(len(left), block.rows, block.cols)
            part.scatter_add_(1, left[:, :, None].expand_as(right), right)
        total = part if total is None else total + part
    if total is None:
        raise ValueError(f"block {block.name!r} has no gradient: pass the size of the batch")
    return total


def squared_norms(terms: list[Factors], block: Block) -> Tensor:
    """Squared Euclidean norm of each gradient, `[b]`."""
    if len(terms) == 1 and terms[0].left.is_floating_point():
        left, right = terms[0]
        if left.shape[1] == 1:
            return left.square().sum((1, 2)) * right.square().sum((1, 2))
    positions = sum(term.left.shape[1] for term in terms)
    if positions * (block.rows + block.cols) > block.size and block.size <= WORKSPACE:
        size = len(terms[0].left)
        step = max(1, WORKSPACE // block.size)
        parts = [
            materialise(rows_of(terms, slice(i, i + step)), block).square().sum((1, 2))
            for i in range(0, size, step)
        ]
        return torch.cat(parts)
    total = terms[0].right.new_zeros(len(terms[0].right))
    for one in terms:
        for other in terms:
            gram = _left_gram(one.left, other.left) * (one.right @ other.right.mT)
            total += gram.sum((1, 2))
    return total


@dataclass(frozen=True)
class QuerySide:
    """The query's half of a product, in whichever form is cheaper.

    `terms` are factors; `matrix` is `[q, rows, cols]`, written out. With `stacked` sets of factors
    `[stacked * q, ...]` the product is summed over the sets.
    """

    terms: list[Factors] | None = None
    matrix: Tensor | None = None
    stacked: int = 1

    def __len__(self) -> int:
        """Number of queries."""
        return len(self._first) // self.stacked

    @property
    def _first(self) -> Tensor:
        if self.matrix is not None:
            return self.matrix
        assert self.terms
        return self.terms[0].right

    def to(self, dtype: torch.dtype) -> "QuerySide":
        """The same in another type; products are then formed in it and added up in float32."""
        if self.matrix is not None:
            return QuerySide(matrix=self.matrix.to(dtype))
        terms = [cast(term, dtype) for term in self.terms or ()]
        return QuerySide(terms=terms, stacked=self.stacked)


def prefers_matrix(block: Block, positions: int, queries: int) -> bool:
    """Whether written-out queries are cheaper than ghost products at so many positions."""
    ghost = positions**2 * (block.rows + block.cols + GHOST_OVERHEAD)
    matrix = block.size * (1 + positions / max(queries, 1))
    return matrix < ghost


def positions_of(terms: list[Factors]) -> int:
    """Number of positions t that the gradient sums over."""
    return sum(term.left.shape[1] for term in terms)


def query_side(terms: list[Factors], block: Block) -> QuerySide:
    """Prepare queries for `products` with training batches of similar length."""
    if terms and prefers_matrix(block, positions_of(terms), len(terms[0].right)):
        return QuerySide(matrix=materialise(terms, block))
    return QuerySide(terms=terms)


def add_products(out: Tensor, side: QuerySide, train: list[Factors], block: Block) -> None:
    """Add the inner products of queries and training gradients to `out` `[q, b]`."""
    if side.matrix is not None:
        _add_matrix_products(out, side.matrix, train, block)
        return
    for query in side.terms or ():
        for term in train:
            narrow = cast(term, query.right.dtype)
            if side.stacked == 1:
                _add_ghost_products(out, query, narrow)
            else:
                _add_stacked_products(out, query, narrow, side.stacked)


def products(sides: dict[str, QuerySide], train: Gradients, plan: Plan) -> Tensor:
    """Inner products of all queries and training gradients, summed over blocks, `[q, b]`."""
    like = next(iter(train.values()))[0].right
    out = like.new_zeros(len(next(iter(sides.values()))), len(like))
    for name, block in plan.blocks.items():
        add_products(out, sides[name], train[name], block)
    return out


def cast(term: Factors, dtype: torch.dtype) -> Factors:
    """Factors in another floating-point type; one-hot rows stay."""
    if term.right.dtype == dtype:
        return term
    left = term.left.to(dtype) if term.left.is_floating_point() else term.left
    if is_one(term.right):  # stays the one that takes no memory
        return Factors(left, left.new_ones(1, 1, 1).expand(len(left), 1, 1))
    return Factors(left, term.right.to(dtype))


def rows_of(terms: list[Factors], rows: slice) -> list[Factors]:
    """The gradients of some examples of a batch."""
    return [Factors(left[rows], right[rows]) for left, right in terms]


def joined(parts: list[Gradients]) -> Gradients:
    """Gradients of several batches as one; shorter sequences are padded with zero positions."""
    if len(parts) == 1:
        return parts[0]
    whole: Gradients = {}
    for name in parts[0]:
        kinds = {term.left.is_floating_point() for part in parts for term in part[name]}
        whole[name] = [_joined_terms([part[name] for part in parts], kind) for kind in kinds]
    return whole


def _joined_terms(parts: list[list[Factors]], floating: bool) -> Factors:
    terms = []
    for part in parts:
        same = [term for term in part if term.left.is_floating_point() == floating]
        if not same:
            raise TaskError(
                "a layer was used in some batches of queries and not in others: score queries of "
                "one kind at a time"
            )
        terms.append(same[0])
    longest = max(term.left.shape[1] for term in terms)
    if all(is_written(term, longest) for term in terms):
        return written_out(torch.cat([term.right for term in terms]))

    def padded(x: Tensor) -> Tensor:
        missing = longest - x.shape[1]
        return torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], 1) if missing else x

    return Factors(
        torch.cat([padded(term.left) for term in terms]),
        torch.cat([padded(term.right) for term in terms]),
    )


def sum_by_row(terms: list[Factors], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with one-hot left factors as their non-zero rows.

    Returns:
        example `[u]`, row `[u]` and the row's gradient `[u, cols]`, for each example and row met.
    """
    (left, right) = terms[0]
    example = torch.arange(len(left), device=left.device)[:, None].expand_as(left)
    keys, inverse = (example * rows + left).flatten().unique(return_inverse=True)
    summed = right.new_zeros(len(keys), right.shape[2])
    summed.index_add_(0, inverse, right.flatten(0, 1))
    return keys // rows, keys % rows, summed


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """`Σ_t left_t ⊗ right_t`, `[b, rows, cols]`."""
    if is_one(right):
        return left.mT
    if left.shape[1] == 1:
        return left.mT * right
    return left.mT @ right


def _add_matrix_products(out: Tensor, matrix: Tensor, train: list[Factors], block: Block) -> None:
    flat = matrix.flatten(1)  # [q, rows * cols]
    step = max(1, WORKSPACE // block.size)
    for start in range(0, out.shape[1], step):
        rows = slice(start, start + step)
        if train:
            written = materialise(rows_of(train, rows), block).flatten(1)
            out[:, rows] += flat @ written.to(flat.dtype).T


def _add_ghost_products(out: Tensor, query: Factors, train: Factors) -> None:
    tq, tb = query.left.shape[1], train.left.shape[1]
    if tq == 1 and tb == 1 and _floating(query, train):
        if train.right.shape[2] == 1:  # a vector; a number each, folded into the left factor
            one, other = _folded(query), _folded(train)
            if out.dtype == one.dtype:
                out.addmm_(one, other.T)
            else:
                out += one @ other.T
            return
        lefts = query.left[:, 0] @ train.left[:, 0].T  # [q, b]
        out.addcmul_(lefts, query.right[:, 0] @ train.right[:, 0].T)
        return
    if tq == 0 or tb == 0:  # a layer that was not reached
        return
    size = out.shape[1]
    step = max(1, WORKSPACE // (tq * tb * size))
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        products = query.right[rows].flatten(0, 1) @ train.right.flatten(0, 1).T
        products *= _left_products(query.left[rows], train.left)  # [q * tq, b * tb]
        out[rows] += products.view(-1, tq, size, tb).sum((1, 3), dtype=out.dtype)


def _folded(vector: Factors) -> Tensor:
    """A written-out gradient `[b, p]`."""
    left, right = vector
    return left[:, 0] if is_one(right) else (left * right)[:, 0]


def _add_stacked_products(out: Tensor, query: Factors, train: Factors, stacked: int) -> None:
    """One long product for many sets of queries, then their sum."""
    queries, size = out.shape
    if query.left.shape[1] != 1 or train.left.shape[1] != 1:
        for i in range(stacked):
            rows = slice(i * queries, (i + 1) * queries)
            _add_ghost_products(out, Factors(query.left[rows], query.right[rows]), train)
        return
    # Contiguous after the transposition: the products are a third faster, and it is done once.
    left, right = train.left[:, 0].T.contiguous(), train.right[:, 0].T.contiguous()
    step = max(1, STACK_WORKSPACE // (queries * size)) * queries
    for start in range(0, stacked * queries, step):
        rows = slice(start, start + step)
        products = query.left[rows, 0] @ left  # [sets * q, b]
        products.mul_(query.right[rows, 0] @ right)
        out += products.view(-1, queries, size).sum(0, dtype=out.dtype)


def _floating(*factors: Factors) -> bool:
    return all(factor.left.is_floating_point() for factor in factors)


def _left_products(query: Tensor, train: Tensor) -> Tensor:
    """Products of all pairs of left vectors, `[q * tq, b * tb]`; integers are one-hot rows."""
    query, train = query.flatten(0, 1), train.flatten(0, 1)
    if query.is_floating_point() and train.is_floating_point():
        return query @ train.T
    if query.is_floating_point():
        return query[:, train]
    if train.is_floating_point():
        return train[:, query].T.contiguous()
    return query[:, None] == train[None]


def _left_gram(one: Tensor, other: Tensor) -> Tensor:
    """Products of the left vectors of the same example, `[b, t, t']`."""
    if one.is_floating_point() and other.is_floating_point():
        return one @ other.mT
    if one.is_floating_point():
        return one.gather(2, other[:, None].expand(-1, one.shape[1], -1))
    if other.is_floating_point():
        return _left_gram(other, one).mT
    return one[:, :, None] == other[:, None]
