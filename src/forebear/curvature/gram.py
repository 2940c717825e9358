"""Exact curvature in the span of its rows: `C = RᵀR / n` by the Gram matrix `RRᵀ / n`.

With fewer rows than parameters the eigenvectors of the small matrix give all those of the large one
whose eigenvalue is not zero, so any function of C is exact and no `[P, P]` matrix exists.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from scipy.linalg import get_blas_funcs
from torch import Tensor

from forebear.capture import Gradients
from forebear.curvature.base import GradientStream
from forebear.curvature.damping import Damping
from forebear.curvature.dense import LARGEST, Dense, FittedBlocks, FittedDense
from forebear.curvature.moments import MANY_ROWS, symmetric
from forebear.curvature.roots import root_gradients, rows_per_example
from forebear.curvature.solved import write
from forebear.curvature.span import FittedSpan, Span, restored_span
from forebear.curvature.spectrum import Eigenpairs, FittedSpectrum, restored
from forebear.differentiation import Function
from forebear.errors import TaskError
from forebear.gradients import Precision
from forebear.stream import Stream
from forebear.types import require_choices

MOST_ROWS = 20_000
"""Rows beyond which the Gram matrix is refused (3.2 GB in double precision)."""

KEPT_BYTES = 2**31
"""Rows written out may take so much (2 GB); eigenvectors, where they are formed, as much again."""

TAKEN_OUT = 4
"""Directions that are taken out of a product in single precision."""

COLUMNS = 2**22
"""Entries of a stretch of columns: memory that is used again costs no time to get (16 MB)."""

SAMPLED = 4096
"""Columns in which these are looked for."""


@dataclass(frozen=True, kw_only=True)
class GramSpectrum:
    """The exact Gauss-Newton or empirical Fisher matrix by its eigenvectors.

    Attributes:
        kind: `"gauss_newton"`, c rows for each example with c outputs, or `"fisher"`: one row, the
            training gradient.
        precision: of the products of all pairs; `"bfloat16"` adds up in float32.
    """

    kind: Literal["gauss_newton", "fisher"] = "gauss_newton"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        require_choices(self)

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> FittedSpectrum:
        """Write the rows out, and diagonalise their Gram matrix.

        Raises:
            TaskError: there are more than `MOST_ROWS` rows, or they do not fit into `KEPT_BYTES`.
        """
        rows, _ = self._rows(stream, function)  # [m, P]
        examples = len(stream.data)
        values, turns, mean = _spectrum(rows, examples)
        scaled = turns / (values * examples).sqrt()
        vectors = scaled.T.to(rows.dtype) @ rows  # [r, P]
        pairs = Eigenpairs(
            stream.plan,
            values.to(rows.dtype),
            vectors,
            mean,
            examples,
            complete=True,
            precision=self.precision,
        )
        return pairs.with_damping(damping)

    def span(
        self, stream: GradientStream, function: Function, damping: Damping
    ) -> FittedSpan | None:
        """The same for scores of the training set alone: rows are kept, and no eigenvectors.

        None where rows are not gradients of training examples and all parameters.

        Raises:
            TaskError: as `fit`.
        """
        if self.kind != "fisher" or not isinstance(stream, Stream):
            return None
        rows, weights = self._rows(stream, function)
        values, turns, mean = _spectrum(rows, len(stream.data))
        return Span(stream.plan, rows, weights, values, turns, mean).with_damping(damping)

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> FittedSpectrum | FittedSpan:
        """From saved rows or eigenvectors."""
        if "rows" in tensors:
            return restored_span(stream.plan, tensors)
        size = len(stream.data)
        return restored(stream.plan, tensors, size, complete=True, precision=self.precision)

    def count(self, stream: GradientStream) -> int:
        """Rows of R: as many as examples, times the model's outputs for Gauss-Newton."""
        if self.kind == "fisher":
            return len(stream.data)
        return len(stream.data) * _outputs(stream)

    def _rows(self, stream: GradientStream, function: Function) -> tuple[Tensor, Tensor]:
        """Rows `[m, P]`, and the weights `[m]` that the function has for them."""
        count, size = self.count(stream), _size(stream)
        if count > MOST_ROWS:
            raise TaskError(
                f"{count} rows are too many for an exact curvature of {size} parameters: project "
                "gradients with dimension=2048 (das, dtrak, trak), use cg, arnoldi or ekfac, or up "
                f"to {MOST_ROWS} examples times outputs"
            )
        entry = 8 if next(stream.task.model.parameters()).dtype == torch.float64 else 4
        if entry * count * size > KEPT_BYTES:
            raise TaskError(
                f"{count} gradients of {size} parameters take {entry * count * size / 2**30:.1f} "
                "GB written out: project them with dimension=2048 (das, dtrak, trak), select fewer "
                "layers with layers=, or use cg, arnoldi or ekfac"
            )
        rows: Tensor | None = None
        weights, start = [], 0
        for gradients in self._parts(stream, function):
            first = start
            like = next(iter(gradients.values()))[0].right
            rows = like.new_empty(count, size) if rows is None else rows
            start += len(like)
            write(gradients, stream.plan, rows[first:start])
            own = getattr(function, "weights", torch.ones(()))
            weights.append(own.to(rows).expand(start - first))
        assert rows is not None
        return rows, torch.cat(weights)

    def _parts(self, stream: GradientStream, function: Function) -> Iterator[Gradients]:
        if self.kind == "fisher":
            yield from (g for _, _, g in stream.gradients(function, "gradients"))
            return
        if not isinstance(stream, Stream):
            raise TaskError(
                "the Gauss-Newton matrix of projected gradients is not known: use kind='fisher'"
            )
        yield from (g for _, _, g in root_gradients(stream))


@dataclass(frozen=True)
class Whole:
    """An exact curvature in whichever form is smaller: a matrix, or the span of its rows.

    Attributes:
        dense: what is wanted; a Hessian, matrices by layer and pseudo-inverses are always dense.
    """

    dense: Dense = field(default_factory=Dense)

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> FittedDense | FittedBlocks | FittedSpectrum:
        """As `Dense` or as `GramSpectrum`: the scores are the same."""
        gram = self._gram
        if gram is not None and self._spans(gram, stream):
            return gram.fit(stream, function, damping, seed)
        return self.dense.fit(stream, function, damping, seed)

    def span(
        self, stream: GradientStream, function: Function, damping: Damping
    ) -> FittedSpan | None:
        """As `GramSpectrum`; None where that is not the smaller form."""
        gram = self._gram
        if gram is None or not self._spans(gram, stream):
            return None
        return gram.span(stream, function, damping)

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> Any:
        """In the form that was saved."""
        if self._gram is not None and not {"rows", "eigenvectors"}.isdisjoint(tensors):
            return self._gram.restore(stream, function, tensors)
        return self.dense.restore(stream, function, tensors)

    @staticmethod
    def _spans(gram: GramSpectrum, stream: GradientStream) -> bool:
        rows, size = gram.count(stream), _size(stream)
        return rows < size or (size > LARGEST and rows <= MOST_ROWS)

    @property
    def _gram(self) -> GramSpectrum | None:
        dense = self.dense
        if dense.kind == "hessian" or dense.blocks != "all" or dense.indefinite == "pseudo_inverse":
            return None
        return GramSpectrum(kind=dense.kind, precision=dense.precision)


def _spectrum(rows: Tensor, examples: int) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues `[r]` of `RᵀR / n` that are not zero, those vectors of `RRᵀ` `[m, r]`, the mean.

    All in double precision.
    """
    values, turns = torch.linalg.eigh(gram(rows).div_(examples))
    mean = max(values.sum().item(), 0.0) / rows.shape[1]
    # What is below the rounding of the Gram matrix is no direction at all, nor is what the rows
    # are too coarse for: errors of an eigenvector grow with the root of the largest over its
    # own eigenvalue.
    coarse = (100 * torch.finfo(rows.dtype).eps) ** 2
    floor = max(coarse, torch.finfo(torch.float64).eps * len(rows))
    kept = values > floor * max(values[-1].item(), 0.0)
    return values[kept], turns[:, kept].contiguous(), mean


def gram(rows: Tensor) -> Tensor:
    """`RRᵀ` of `[m, P]` in double precision.

    Gradients of diffusion models have a few directions with nearly all of the length, and rounding
    of a product in single precision would hide eigenvalues far above the ridge. So the strongest
    directions are taken out first: with `R = C + U B`, where U is orthonormal and C what is left,

        RRᵀ = CCᵀ + CBᵀUᵀ + UBCᵀ + UBBᵀUᵀ

    whatever U is. The last term is formed in double precision; the others are small, and formed in
    single precision, some columns at a time.
    """
    size = len(rows)
    total = rows.new_zeros(size, size, dtype=torch.float64)
    step = max(1, COLUMNS // size)
    if rows.dtype == torch.float64:
        for part in rows.split(step, 1):
            total += _own_products(part.contiguous())
        return symmetric(total)
    strongest = _strongest(rows)  # [m, k]
    crossed = total.new_zeros(strongest.shape)
    common = total.new_zeros(strongest.shape[1], strongest.shape[1])
    for part in rows.split(step, 1):
        shared = strongest.T @ part  # [k, columns]
        rest = torch.addmm(part, strongest, shared, alpha=-1.0)
        total += _own_products(rest)
        crossed += rest @ shared.T
        wide = shared.double()
        common.addmm_(wide, wide.T)
    strongest = strongest.double()
    half = torch.addmm(crossed, strongest, common, alpha=0.5) @ strongest.T
    return symmetric(total).add_(half).add_(half.T)


def _own_products(part: Tensor) -> Tensor:
    """`RRᵀ` of `[m, c]`, contiguous; what is below the diagonal may be missing."""
    if part.device.type != "cpu" or len(part) < MANY_ROWS // 8:
        return part @ part.T
    # Half of the products; torch has no symmetric one.
    x = part.numpy().T
    (syrk,) = get_blas_funcs(("syrk",), (x,))
    return torch.from_numpy(syrk(1.0, x, trans=1, lower=1).T)


def _strongest(rows: Tensor) -> Tensor:
    """Orthonormal columns `[m, k]` near the first eigenvectors of `RRᵀ`, from some of R."""
    some = rows[:, :: max(1, rows.shape[1] // SAMPLED)]
    generator = torch.Generator().manual_seed(0)
    count = min(TAKEN_OUT, *some.shape)
    found = some @ torch.randn(some.shape[1], count, generator=generator).to(some)
    for _ in range(2):
        found = torch.linalg.qr(some @ (some.T @ found))[0]
    return found


def _outputs(stream: GradientStream) -> int:
    outputs = rows_per_example(stream)
    if outputs > 1000:
        raise TaskError(
            f"the exact Gauss-Newton matrix needs a pass for each of {outputs} outputs of an "
            "example: use kind='fisher', or ekfac, which samples targets instead"
        )
    return outputs


def _size(stream: GradientStream) -> int:
    return sum(block.size for block in stream.plan.blocks.values())
