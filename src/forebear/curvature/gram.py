"""Exact curvature in the span of its rows: `C = RᵀR / n` by the Gram matrix `RRᵀ / n`.

With fewer rows than parameters the eigenvectors of the small matrix give all those of the large one
whose eigenvalue is not zero, so any function of C is exact and no `[P, P]` matrix exists.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from forebear.capture import Function, Gradients
from forebear.curvature.base import GradientStream
from forebear.curvature.damping import Damping
from forebear.curvature.dense import LARGEST, Dense, FittedBlocks, FittedDense
from forebear.curvature.roots import root_gradients, rows_per_example
from forebear.curvature.solved import flat
from forebear.curvature.spectrum import Eigenpairs, FittedSpectrum, restored
from forebear.errors import TaskError
from forebear.gradients import WORKSPACE, Precision
from forebear.stream import Stream
from forebear.types import require_choices

MOST_ROWS = 20_000
"""Rows beyond which the Gram matrix is refused (3.2 GB in double precision)."""

KEPT_BYTES = 2**31
"""Rows written out may take so much (2 GB); their eigenvectors take as much again."""


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
        rows = self._rows(stream, function)  # [m, P]
        examples = len(stream.data)
        values, turns = torch.linalg.eigh(_gram(rows).div_(examples))
        mean = max(values.sum().item(), 0.0) / rows.shape[1]
        # What is below the rounding of the Gram matrix is no direction at all, nor is what the rows
        # are too coarse for: errors of an eigenvector grow with the root of the largest over its
        # own eigenvalue.
        coarse = (100 * torch.finfo(rows.dtype).eps) ** 2
        floor = max(coarse, torch.finfo(torch.float64).eps * len(rows))
        kept = values > floor * max(values[-1].item(), 0.0)
        values, turns = values[kept], turns[:, kept]
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

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> FittedSpectrum:
        """From saved eigenvectors."""
        size = len(stream.data)
        return restored(stream.plan, tensors, size, complete=True, precision=self.precision)

    def count(self, stream: GradientStream) -> int:
        """Rows of R: as many as examples, times the model's outputs for Gauss-Newton."""
        if self.kind == "fisher":
            return len(stream.data)
        return len(stream.data) * _outputs(stream)

    def _rows(self, stream: GradientStream, function: Function) -> Tensor:
        count, size = self.count(stream), _size(stream)
        if count > MOST_ROWS:
            raise TaskError(
                f"{count} rows are too many for an exact curvature of {size} parameters: use cg, "
                f"arnoldi or ekfac, or up to {MOST_ROWS} examples times outputs"
            )
        entry = 8 if next(stream.task.model.parameters()).dtype == torch.float64 else 4
        if entry * count * size > KEPT_BYTES:
            raise TaskError(
                f"{count} gradients of {size} parameters take {entry * count * size / 2**30:.1f} "
                "GB written out: use cg, arnoldi or ekfac, or select fewer layers with layers="
            )
        rows: Tensor | None = None
        start = 0
        for gradients in self._parts(stream, function):
            for part in flat(gradients, stream.plan):
                rows = part.new_empty(count, size) if rows is None else rows
                rows[start : start + len(part)] = part
                start += len(part)
        assert rows is not None
        return rows

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
        if gram is not None:
            rows, size = gram.count(stream), _size(stream)
            if rows < size or (size > LARGEST and rows <= MOST_ROWS):
                return gram.fit(stream, function, damping, seed)
        return self.dense.fit(stream, function, damping, seed)

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> Any:
        """In the form that was saved."""
        if self._gram is not None and "eigenvectors" in tensors:
            return self._gram.restore(stream, function, tensors)
        return self.dense.restore(stream, function, tensors)

    @property
    def _gram(self) -> GramSpectrum | None:
        dense = self.dense
        if dense.kind == "hessian" or dense.blocks != "all" or dense.indefinite == "pseudo_inverse":
            return None
        return GramSpectrum(kind=dense.kind, precision=dense.precision)


def _gram(rows: Tensor) -> Tensor:
    """`RRᵀ` of `[m, P]` in double precision, some columns at a time.

    In single precision its rounding would hide eigenvalues far above the ridge: gradients of
    diffusion models have a few directions with nearly all of the length.
    """
    total = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(max(1, WORKSPACE // len(rows)), 1):
        wide = part.double()
        total.addmm_(wide, wide.T)
    return total


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
