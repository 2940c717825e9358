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

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Gradients
from forebear.curvature.accumulate import Kept, Targets, moments_of, squares_of
from forebear.curvature.base import GradientStream
from forebear.curvature.basis import Basis, ShortSum, is_one_hot, short_sums
from forebear.curvature.damping import Damping, Horizon, damped_inverse, damping_for
from forebear.curvature.moments import FactorMoments
from forebear.differentiation import Function
from forebear.errors import TaskError
from forebear.gradients import (
    Precision,
    QuerySide,
    add_products,
    cast,
    positions_of,
    sum_by_row,
)
from forebear.layers import Factors
from forebear.stream import goes_elsewhere, summed
from forebear.types import require_choices

KEPT_BYTES = 2**26
"""Factors of the training set up to 64 MB are kept between the two passes of EK-FAC."""


@dataclass(frozen=True, kw_only=True)
class Kronecker:
    """K-FAC or EK-FAC.

    Attributes:
        corrected: measure the eigenvalues (EK-FAC) instead of multiplying the factors' (K-FAC).
        targets: `"sampled"` from the model's prediction, which gives the Gauss-Newton matrix of
            the usual losses; `"exact"`, the expectation over all targets without sampling, in a
            backward pass for each output; or `"empirical"`: the training labels.
        draws: targets sampled for each example.
        sharing: what positions of an example are to the factors: a sample each (`"expand"`), or
            parts of one, with inputs averaged and gradients summed (`"reduce"`).
        damping_form: λ is added to the eigenvalues of the product (`"exact"`), or √λ to those of
            each factor (`"factored"`), which only K-FAC can.
        tolerance: relative error allowed to the low-rank inverse, root mean square over pairs.
        rank: most terms of the low-rank inverse; None contracts exactly.
        precision: of the products of all pairs; `"bfloat16"` adds up in float32 and is several
            times faster where the processor has such products.
    """

    corrected: bool = True
    targets: Literal["sampled", "exact", "empirical"] = "sampled"
    draws: int = 1
    sharing: Literal["expand", "reduce"] = "expand"
    damping_form: Literal["exact", "factored"] = "exact"
    tolerance: float = 0.018
    rank: int | None = 128
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        require_choices(self)
        if self.draws < 1 or (self.draws > 1 and self.targets != "sampled"):
            raise TaskError(
                f"draws is {self.draws} with targets={self.targets!r}: at least 1, and more only "
                "of targets='sampled'"
            )
        if self.corrected and self.damping_form == "factored":
            raise TaskError(
                "damping_form='factored' damps the two factors, and EK-FAC's eigenvalues are not a "
                "product of theirs: use 'exact', or kfac"
            )

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> "FittedKronecker":
        """One pass for the factors' moments and, for EK-FAC, one for the eigenvalues.

        Where the factors of all examples fit into `KEPT_BYTES` the second pass is not needed.
        """
        size, kept = len(stream.data), None
        if self.corrected and not goes_elsewhere(stream):
            kept = Kept(KEPT_BYTES, self.precision)
        targets = Targets(self.targets, self.draws, function, seed)
        reduce = self.sharing == "reduce"
        found = summed(stream, partial(moments_of, targets, reduce, kept), "curvature factors")
        bases = {}
        for name, block in stream.plan.blocks.items():
            positions = int(found.pop(f"{name}/all_positions"))
            bases[name] = Basis.of(block, FactorMoments.taken(found, name), size)
            if reduce:
                bases[name] = replace(bases[name], positions=positions / size)
        if self.corrected:
            # The same targets again, so that it makes no difference whether factors were kept.
            again = partial(squares_of, targets, bases, self.precision, kept)
            squares = summed(stream, again, "curvature eigenvalues")
            eigenvalues = {name: total.div_(size) for name, total in squares.items()}
        else:
            eigenvalues = {name: basis.product() for name, basis in bases.items()}
        return self._fitted(stream, bases, eigenvalues).with_damping(damping)

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> "FittedKronecker":
        """From saved bases, eigenvalues and damping."""
        bases, eigenvalues, used, inverses = {}, {}, {}, {}
        for name, block in stream.plan.blocks.items():
            parts = {
                key.rpartition("/")[2]: value
                for key, value in tensors.items()
                if key.rpartition("/")[0] == name
            }
            bases[name] = Basis(
                block,
                parts.get("left_vectors"),
                parts.get("right_vectors"),
                parts["left_moments"],
                parts["right_moments"],
                parts["positions"].item(),
            )
            eigenvalues[name], used[name] = parts["eigenvalues"], parts["damping"].item()
            inverses[name] = parts["inverse"]
        return self._fitted(stream, bases, eigenvalues).inverted(used, inverses)

    def _fitted(
        self,
        stream: GradientStream,
        bases: dict[str, "Basis"],
        eigenvalues: dict[str, Tensor],
    ) -> "EigenBlocks":
        examples = len(stream.data)
        return EigenBlocks(
            stream.plan,
            bases,
            eigenvalues,
            examples,
            self.rank,
            self.tolerance,
            self.precision,
            factored=self.damping_form == "factored",
        )


@dataclass(frozen=True)
class EigenBlocks:
    """Bases and eigenvalues of the blocks: all that does not depend on damping."""

    plan: Plan
    bases: dict[str, Basis]
    eigenvalues: dict[str, Tensor]
    examples: int
    rank: int | None = None
    tolerance: float = 0.018
    precision: Precision = "float32"
    factored: bool = False

    def with_damping(self, damping: Damping) -> "FittedKronecker":
        """Inverted.

        Raises:
            TaskError: a block has neither curvature nor damping.
        """
        used, inverses = {}, {}
        for name, values in self.eigenvalues.items():
            used[name] = damping_for(damping, values, self.examples)
            if used[name] == 0.0 and not values.any():
                raise TaskError(
                    f"block {name!r} has no curvature (its gradients are all zero) and the damping "
                    "is zero: exclude it with layers=, or use damping=fb.Absolute(...)"
                )
            if not used[name] + values.min() > 0:
                raise TaskError(
                    f"the curvature of block {name!r} is singular (its smallest eigenvalue is "
                    f"{values.min().item():.3g}) and the damping is zero: use damping="
                )
            if self.factored:
                if isinstance(damping, Horizon) and damping.exact:
                    raise TaskError(
                        "damping=fb.Horizon(..., exact=True) acts on eigenvalues of the product: "
                        "use damping_form='exact'"
                    )
                inverses[name] = _factored_inverse(self.bases[name], used[name])
            else:
                inverses[name] = damped_inverse(damping, used[name], values)
        return self.inverted(used, inverses)

    def inverted(self, used: dict[str, float], inverses: dict[str, Tensor]) -> "FittedKronecker":
        """With known inverse eigenvalues."""
        sums: dict[str, ShortSum] = {}
        if self.rank is not None:
            sums = short_sums(self.bases, inverses, self.rank, self.tolerance)
        blocks = {
            name: KroneckerBlock(
                basis, self.eigenvalues[name], inverses[name], used[name], sums.get(name)
            )
            for name, basis in self.bases.items()
        }
        return FittedKronecker(self.plan, blocks, self.precision, self)


@dataclass(frozen=True)
class PreparedBlock:
    """Preconditioned queries of a block and the basis in which training gradients meet them."""

    sides: list[QuerySide]
    basis: Basis | ShortSum | None

    def narrowed(self) -> "PreparedBlock":
        """The same for products in bfloat16."""
        basis = None if self.basis is None else self.basis.narrow()
        return PreparedBlock([side.to(torch.bfloat16) for side in self.sides], basis)


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
        if is_one_hot(query):
            return False
        if self.short is None or not _all_floating(query):
            return block.cols > 1
        t = positions_of(query)
        kept = self.short.u.shape[1] + self.short.v.shape[1]
        ghost = len(self.short.u) * t**2 * (kept + 8)
        return block.size * (1 + t / max(queries, 1)) < ghost

    def prepare(self, terms: list[Factors], precision: Precision = "float32") -> PreparedBlock:
        """Precondition queries."""
        if is_one_hot(terms) or (self.basis.block.cols == 1 and _all_floating(terms)):
            rotated = self.basis.rotate(terms)
            return PreparedBlock([QuerySide(terms=self._scaled(rotated))], self.basis)
        if not self.uses_matrix(terms, len(terms[0].right)):
            assert self.short is not None
            return PreparedBlock(self.short.sides(terms, precision), self.short)
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
        if is_one_hot(terms):
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
    precision: Precision = "float32"
    source: EigenBlocks | None = field(default=None, repr=False)

    def with_damping(self, damping: Damping) -> "FittedKronecker":
        """The same curvature with another damping; its eigenvectors are kept."""
        assert self.source is not None
        return self.source.with_damping(damping)

    def query_bytes(self, query: Gradients, queries: int) -> int:
        """Bytes of one prepared query."""
        total, entry = 0, 2 if self.precision == "bfloat16" else 4
        for name, block in self.blocks.items():
            shape = block.basis.block
            if block.uses_matrix(query[name], queries):
                total += entry * shape.size
            else:
                ranks = len(block.short.u) if block.short else 1
                total += entry * ranks * positions_of(query[name]) * (shape.rows + shape.cols)
        return total

    def prepare(self, queries: Gradients) -> dict[str, PreparedBlock]:
        """Preconditioned queries by block."""
        ready = {
            name: block.prepare(queries[name], self.precision)
            for name, block in self.blocks.items()
        }
        if self.precision == "bfloat16":
            ready = {name: one.narrowed() for name, one in ready.items()}
        return ready

    def products(self, prepared: dict[str, PreparedBlock], train: Gradients) -> Tensor:
        """Inner products of all pairs, `[q, b]`."""
        out: Tensor | None = None
        for name, ready in prepared.items():
            terms = train[name]
            if self.precision == "bfloat16":
                terms = [cast(term, torch.bfloat16) for term in terms]
            if ready.basis is not None:
                terms = ready.basis.rotate(terms)
            if out is None:
                side = ready.sides[0]
                out = train[name][0].right.new_zeros(len(side), len(train[name][0].right))
            for side in ready.sides:
                add_products(out, side, terms, self.plan.blocks[name])
        assert out is not None
        return out

    def solve(self, rows: Tensor) -> Tensor:
        """`(C + λI)⁻¹` applied to each row of `[m, P]`, exactly."""
        solved = []
        pieces = rows.split([block.basis.block.size for block in self.blocks.values()], 1)
        for piece, block in zip(pieces, self.blocks.values(), strict=True):
            shape = block.basis.block
            rotated = block.basis.rotate_matrix(piece.reshape(-1, shape.rows, shape.cols))
            back = block.basis.rotate_matrix(rotated * block.inverse, back=True)
            solved.append(back.flatten(1))
        return torch.cat(solved, 1)

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
                "inverse": block.inverse,
                "positions": torch.tensor(basis.positions, dtype=torch.float64),
                "damping": torch.tensor(block.damping, dtype=torch.float64),
            }
            out |= {f"{name}/{key}": value for key, value in parts.items() if value is not None}
        return out

    def details(self) -> dict[str, Any]:
        """λ of each block."""
        return {"damping_used": {name: block.damping for name, block in self.blocks.items()}}


def _all_floating(terms: list[Factors]) -> bool:
    return all(term.left.is_floating_point() for term in terms)


def _factored_inverse(basis: Basis, damping: float) -> Tensor:
    """Eigenvalues of `(S + √λ/π I)⁻¹ ⊗ (A + π√λ I)⁻¹`, `[rows, cols]`.

    π² = mean eigenvalue of A / mean eigenvalue of S, after Martens & Grosse (2015), section 6.3.
    """
    left, right = basis.left_moments, basis.right_moments
    tiny = torch.finfo(left.dtype).tiny
    pi = (right.mean() / left.mean().clamp_min(tiny)).clamp_min(tiny).sqrt()
    root = damping**0.5
    return torch.outer(1 / (left + root / pi), 1 / (right + root * pi))
