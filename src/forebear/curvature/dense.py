"""Dense curvature over all blocks together, or of each: exact, for few parameters."""

import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from scipy.linalg import cho_solve, get_lapack_funcs
from torch import Tensor

from forebear.blocks import Block, Plan
from forebear.curvature.base import GradientStream
from forebear.curvature.damping import (
    Damping,
    EffectiveDimension,
    Horizon,
    damped_inverse,
    damping_for,
)
from forebear.curvature.moments import add_gram, symmetric
from forebear.curvature.outputs import AllTargets, gradients_of_each
from forebear.curvature.solved import Solved, flat
from forebear.data import map_tensors, naming, require_finite
from forebear.differentiation import Function, Wrapped
from forebear.errors import NumericalWarning, TaskError
from forebear.gradients import Precision
from forebear.stream import summed
from forebear.types import require_choices

LARGEST = 20_000
"""Parameters beyond which a dense matrix is refused (3.2 GB in double precision)."""

TANGENTS = 64
"""Rows of a Hessian formed at a time."""

Matrices = dict[str, Tensor]
"""Symmetric matrices by the blocks they stand for; `"all"` for all together."""

_NOUNS = {
    "hessian": "Hessian",
    "gauss_newton": "Gauss-Newton matrix",
    "fisher": "second moments",
}


@dataclass(frozen=True, kw_only=True)
class Dense:
    """An exact curvature of the mean training loss, written out.

    Attributes:
        kind: `"hessian"`, `"gauss_newton"` (exact, from the model's outputs), or `"fisher"`: the
            second moment of the gradients themselves (empirical Fisher; TRAK's `ΦᵀΦ / n`).
        blocks: one `[P, P]` matrix over `"all"` blocks, or one for each of the `"layers"` with
            nothing between them; only what is used is computed.
        indefinite: what becomes of negative eigenvalues of a Hessian: their `"absolute"` value,
            `"clip"` to zero, or `"keep"` them, with a warning when damping does not cover them.
            `"pseudo_inverse"` keeps them too, for any kind, and leaves out directions whose damped
            eigenvalue is below `cutoff` times the largest.
        cutoff: of the pseudo-inverse, relative.
        precision: of the products of all pairs; `"bfloat16"` adds up in float32.
    """

    kind: Literal["hessian", "gauss_newton", "fisher"] = "hessian"
    blocks: Literal["all", "layers"] = "all"
    indefinite: Literal["absolute", "clip", "keep", "pseudo_inverse"] = "absolute"
    cutoff: float = 1e-6
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        require_choices(self)
        if not 0 <= self.cutoff < 1:
            raise TaskError(f"cutoff is {self.cutoff}: it is relative, from 0 up to 1")

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> "FittedDense | FittedBlocks":
        """Accumulate the matrices over the stream and factorise them.

        Raises:
            TaskError: there are more than `LARGEST` parameters, or a matrix is singular.
        """
        matrices = self.matrices(stream, function)
        return self._fitted(stream, matrices).with_damping(damping)

    def matrices(self, stream: GradientStream, function: Function) -> Matrices:
        """The curvature itself, as it is before anything becomes of its eigenvalues.

        Returns:
            `{"all": [P, P]}`, or one matrix for each block of the plan.

        Raises:
            TaskError: there are more than `LARGEST` parameters.
        """
        sizes = [block.size for block in stream.plan.blocks.values()]
        size = sum(sizes) if self.blocks == "all" else round(sum(s**2 for s in sizes) ** 0.5)
        if size > LARGEST:
            raise TaskError(
                f"a dense curvature of {sum(sizes)} parameters does not fit: select fewer with "
                f"layers= (up to {LARGEST} together), or use kfac, ekfac or trak"
            )
        add = self._hessian if self.kind == "hessian" else self._second_moments
        total = summed(stream, partial(add, function), _NOUNS[self.kind])
        if self.kind == "hessian":
            total = {name: 0.5 * (matrix + matrix.T) for name, matrix in total.items()}
        else:
            total = {name: symmetric(matrix) for name, matrix in total.items()}
        return {name: matrix.div_(len(stream.data)) for name, matrix in total.items()}

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> "FittedDense | FittedBlocks":
        """From the saved factorisation."""
        if self.blocks == "all":
            return FittedDense.of_tensors(self._symmetric(stream, "all"), tensors)
        parts = {}
        for name in stream.plan.blocks:
            own = {
                key.rpartition("/")[2]: value
                for key, value in tensors.items()
                if key.rpartition("/")[0] == name
            }
            parts[name] = FittedDense.of_tensors(self._symmetric(stream, name), own)
        return FittedBlocks(stream.plan, parts, self.precision)

    def _second_moments(self, function: Function, stream: GradientStream, piece: int) -> Matrices:
        """Upper halves of the sums over a piece."""
        if self.kind == "gauss_newton":
            batches = gradients_of_each(stream, AllTargets(stream), _NOUNS[self.kind])
        else:
            batches = ([g] for _, _, g in stream.gradients(function, _NOUNS[self.kind]))
        plans = self._plans(stream.plan)
        totals: Matrices = {}
        for several in batches:
            for gradients in several:
                for name, part in plans.items():
                    for rows in flat(gradients, part):
                        if name not in totals:
                            totals[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
                        add_gram(totals[name], rows)
        return totals

    def _hessian(self, function: Function, stream: GradientStream, piece: int) -> Matrices:
        """The Hessian of the loss summed over a piece."""
        task, plans = stream.task, self._plans(stream.plan)
        wrapped = Wrapped(task.model, function)
        parameters = {f"model.{n}": p.detach() for n, p in task.model.named_parameters()}
        points = {name: _point(part, parameters) for name, part in plans.items()}
        totals = {name: point.new_zeros(len(point), len(point)) for name, point in points.items()}
        with task.evaluation():
            for where, batch in stream.batches(_NOUNS[self.kind]):
                moved = map_tensors(lambda t: t.to(task.device), batch)
                with torch.no_grad(), naming(stream.data, where):
                    require_finite(function(task.model, moved), "loss")
                for name, part in plans.items():

                    def total_loss(vector: Tensor, part: Plan = part, batch: Any = moved) -> Tensor:
                        chosen = _parameters(part, vector)
                        return torch.func.functional_call(wrapped, chosen, (batch,)).sum()

                    rows = torch.func.jacrev(torch.func.grad(total_loss), chunk_size=TANGENTS)
                    totals[name] += rows(points[name]).detach()
        return totals

    def _plans(self, plan: Plan) -> dict[str, Plan]:
        """What each matrix is over."""
        if self.blocks == "all":
            return {"all": plan}
        return {name: _only(block) for name, block in plan.blocks.items()}

    def _fitted(self, stream: GradientStream, matrices: Matrices) -> "Symmetric | SymmetricBlocks":
        if self.blocks == "all":
            return self._symmetric(stream, "all", matrices["all"])
        parts = {name: self._symmetric(stream, name, m) for name, m in matrices.items()}
        return SymmetricBlocks(stream.plan, parts, self.precision)

    def _symmetric(
        self, stream: GradientStream, name: str, matrix: Tensor | None = None
    ) -> "Symmetric":
        plan = self._plans(stream.plan)[name]
        what = "the curvature" if name == "all" else f"the curvature of block {name!r}"
        return Symmetric(self, plan, what, len(stream.data), matrix)


@dataclass(frozen=True)
class Symmetric:
    """A curvature before it is inverted: all that does not depend on damping."""

    how: Dense
    plan: Plan
    what: str
    examples: int
    matrix: Tensor | None = field(repr=False)

    @cached_property
    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `[P]`, ascending, and eigenvectors `[P, P]`, in double precision."""
        assert self.matrix is not None
        values, vectors = torch.linalg.eigh(self.matrix.double())
        return values, vectors

    def with_damping(self, damping: Damping) -> "FittedDense":
        """Inverted, by the cheaper of two factorisations.

        Raises:
            TaskError: the damped matrix is singular.
        """
        spectral = isinstance(damping, EffectiveDimension) or (
            isinstance(damping, Horizon) and damping.exact
        )
        how, matrix = self.how, self.matrix
        if how.kind == "hessian" or how.indefinite == "pseudo_inverse" or spectral:
            return self.by_eigenvalues(damping)
        assert matrix is not None
        value = damping_for(damping, matrix.diagonal(), self.examples)
        factor = _cholesky(matrix, value, self.what)
        return FittedDense(
            self.plan, value, factor=factor, precision=self.how.precision, source=self
        )

    def by_eigenvalues(self, damping: Damping) -> "FittedDense":
        """Inverted by eigenvectors, which are found once for all dampings.

        Raises:
            TaskError: the damped matrix is singular.
        """
        how = self.how
        values, vectors = self.eigenpairs
        used = values
        if how.kind == "hessian" and how.indefinite == "absolute":
            used = values.abs()
        elif how.indefinite == "clip" or (how.kind != "hessian" and how.indefinite == "absolute"):
            used = values.clamp_min(0)
        # Of the eigenvalues that are used: those of an indefinite Hessian may cancel in the mean.
        value = damping_for(damping, used.abs(), self.examples)
        inverse = self._inverse(damping, value, used)
        dtype = vectors.dtype if self.matrix is None else self.matrix.dtype
        return FittedDense(
            self.plan,
            value,
            vectors=vectors.to(dtype),
            inverse=inverse.to(dtype),
            precision=how.precision,
            source=self,
        )

    def _inverse(self, damping: Damping, value: float, used: Tensor) -> Tensor:
        shifted, lowest = used + value, used[0].item()
        largest, pseudo = shifted.abs().max(), self.how.indefinite == "pseudo_inverse"
        if used.min() + value < (-self.how.cutoff * largest if pseudo else 0):
            warnings.warn(
                f"in {self.what} the lowest eigenvalue is {lowest:.3g} and damping {value:.3g} "
                "does not cover it: scores may have the wrong sign; use indefinite='absolute'",
                NumericalWarning,
                stacklevel=6,
            )
        if pseudo:
            kept = shifted.abs() > self.how.cutoff * largest
            return damped_inverse(damping, value, used).where(kept, 0.0)
        if isinstance(damping, Horizon) and damping.exact:
            return damped_inverse(damping, value, used)
        if not shifted.abs().min() > 1e-14 * largest:
            nearest = used[shifted.abs().argmin()].item()
            raise TaskError(
                f"{self.what} is singular with damping λ = {value:.3g}: it has the eigenvalue "
                f"{nearest:.3g}; increase the damping, or use indefinite='pseudo_inverse'"
            )
        return 1 / shifted


@dataclass(frozen=True)
class FittedDense(Solved):
    """`(C + λI)⁻¹` as a Cholesky factor, or as eigenvectors and inverse eigenvalues."""

    plan: Plan
    damping: float
    factor: Tensor | None = None
    vectors: Tensor | None = None
    inverse: Tensor | None = None
    precision: Precision = "float32"
    source: Symmetric | None = field(default=None, repr=False)

    @classmethod
    def of_tensors(cls, source: Symmetric, tensors: dict[str, Tensor]) -> "FittedDense":
        """What was saved by `tensors`."""
        damping, factor = tensors["damping"].item(), tensors.get("factor")
        vectors, values = tensors.get("vectors"), tensors.get("eigenvalues")
        if factor is not None:
            matrix = factor @ factor.T
            matrix.diagonal().sub_(damping)
            source = replace(source, matrix=matrix)
        elif vectors is not None and values is not None:
            # cached_property keeps its value in the instance, which frozen does not forbid.
            source.__dict__["eigenpairs"] = (values, vectors.double())
        return cls(
            source.plan,
            damping,
            factor=factor,
            vectors=vectors,
            inverse=tensors.get("inverse"),
            precision=source.how.precision,
            source=source,
        )

    def with_damping(self, damping: Damping) -> "FittedDense":
        """The same curvature with another damping; eigenvectors are found once."""
        assert self.source is not None
        return self.source.by_eigenvalues(damping)

    def solve(self, rows: Tensor) -> Tensor:
        """`(C + λI)⁻¹` applied to each row of `[m, P]`."""
        if self.factor is not None:
            return cholesky_solve(rows.to(self.factor.dtype), self.factor).to(rows.dtype)
        assert self.vectors is not None
        assert self.inverse is not None
        return (rows @ self.vectors * self.inverse) @ self.vectors.T

    def tensors(self) -> dict[str, Tensor]:
        """The factorisation."""
        parts = {
            "damping": torch.tensor(self.damping, dtype=torch.float64),
            "factor": self.factor,
            "vectors": self.vectors,
            "inverse": self.inverse,
        }
        if self.vectors is not None and self.source is not None:
            parts["eigenvalues"] = self.source.eigenpairs[0]
        return {key: value for key, value in parts.items() if value is not None}

    def details(self) -> dict[str, Any]:
        """One λ for all."""
        return {"damping_used": {"all": self.damping}}


@dataclass(frozen=True)
class SymmetricBlocks:
    """Curvatures of the blocks before they are inverted."""

    plan: Plan
    parts: dict[str, Symmetric]
    precision: Precision

    def with_damping(self, damping: Damping) -> "FittedBlocks":
        """Each inverted by itself."""
        parts = {name: part.with_damping(damping) for name, part in self.parts.items()}
        return FittedBlocks(self.plan, parts, self.precision)


@dataclass(frozen=True)
class FittedBlocks(Solved):
    """A dense inverse of each block by itself."""

    plan: Plan
    parts: dict[str, FittedDense]
    precision: Precision = "float32"

    def with_damping(self, damping: Damping) -> "FittedBlocks":
        """The same curvature with another damping; eigenvectors are found once."""
        parts = {name: part.with_damping(damping) for name, part in self.parts.items()}
        return FittedBlocks(self.plan, parts, self.precision)

    def solve(self, rows: Tensor) -> Tensor:
        """`(C + λI)⁻¹` applied to each row of `[m, P]`."""
        pieces = rows.split([block.size for block in self.plan.blocks.values()], 1)
        parts = (self.parts[name] for name in self.plan.blocks)
        return torch.cat([part.solve(p) for part, p in zip(parts, pieces, strict=True)], 1)

    def tensors(self) -> dict[str, Tensor]:
        """The factorisations by block."""
        return {
            f"{name}/{key}": value
            for name, part in self.parts.items()
            for key, value in part.tensors().items()
        }

    def details(self) -> dict[str, Any]:
        """λ of each block."""
        return {"damping_used": {name: part.damping for name, part in self.parts.items()}}


def _only(block: Block) -> Plan:
    """A plan of one block; the others stay as they are."""
    return Plan({block.name: block}, ())


def _point(plan: Plan, parameters: dict[str, Tensor]) -> Tensor:
    """The parameters of a plan as one vector `[P]`."""
    matrices = (
        block.matrix({name: parameters[f"model.{name}"] for name in block.parameters})
        for block in plan.blocks.values()
    )
    return torch.cat([matrix.reshape(-1) for matrix in matrices])


def _parameters(plan: Plan, vector: Tensor) -> dict[str, Tensor]:
    """The inverse of `_point`."""
    pieces = vector.split([block.size for block in plan.blocks.values()])
    chosen: dict[str, Tensor] = {}
    for piece, block in zip(pieces, plan.blocks.values(), strict=True):
        chosen |= block.split(piece.view(block.rows, block.cols))
    return {f"model.{name}": tensor for name, tensor in chosen.items()}


def _cholesky(matrix: Tensor, damping: float, what: str) -> Tensor:
    undamped = matrix.diagonal().clone()
    matrix.diagonal().add_(damping)
    factor = cholesky_factor(matrix)
    if factor is None:
        factor = cholesky_factor(matrix.double())
    matrix.diagonal().copy_(undamped)
    if factor is None:
        lowest = torch.linalg.eigvalsh(matrix.double())[0].item()
        raise TaskError(
            f"{what} is singular with damping λ = {damping:.3g}: it has {len(matrix)} dimensions "
            f"and fewer independent gradients, and its smallest eigenvalue is {lowest:.3g}; "
            "increase the damping"
        )
    return factor


def cholesky_factor(matrix: Tensor) -> Tensor | None:
    """Lower factor of a symmetric matrix, or None where it is not positive definite.

    On a CPU by scipy, whose BLAS formed the matrix too: two libraries' threads would take turns
    waiting for each other.
    """
    if matrix.device.type != "cpu":
        factor, failed = torch.linalg.cholesky_ex(matrix)
        return None if failed else factor
    columns = matrix.numpy().T  # the same matrix in LAPACK's order, so that nothing is copied twice
    (potrf,) = get_lapack_funcs(("potrf",), (columns,))
    factor, failed = potrf(columns, lower=True, clean=True)
    return None if failed else torch.from_numpy(factor)


def cholesky_solve(rows: Tensor, factor: Tensor) -> Tensor:
    """`(L Lᵀ)⁻¹` applied to each row of `[m, d]`."""
    if rows.device.type != "cpu":
        return torch.cholesky_solve(rows.T, factor).T
    solved = cho_solve((factor.numpy(), True), rows.detach().numpy().T, check_finite=False)
    return torch.from_numpy(solved).T
