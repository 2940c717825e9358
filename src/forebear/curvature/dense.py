"""Dense curvature over all blocks together: exact, for few parameters or projected gradients."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.linalg import cho_solve, get_lapack_funcs
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Function
from forebear.curvature.base import GradientStream
from forebear.curvature.damping import Damping
from forebear.curvature.moments import add_gram, symmetric
from forebear.curvature.solved import Solved, flat
from forebear.data import map_tensors, naming, require_finite
from forebear.errors import NumericalWarning, TaskError
from forebear.gradients import Precision
from forebear.types import require_choices

LARGEST = 20_000
"""Parameters beyond which a dense matrix is refused (3.2 GB in double precision)."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """An exact `[P, P]` curvature of the mean training loss.

    Attributes:
        kind: `"hessian"`, `"gauss_newton"` (exact, from the model's outputs), or `"fisher"`: the
            second moment of the gradients themselves (empirical Fisher; TRAK's `ΦᵀΦ / n`).
        indefinite: what becomes of negative eigenvalues of a Hessian: their `"absolute"` value,
            `"clip"` to zero, or `"keep"` them, with a warning when damping does not cover them.
        precision: of the products of all pairs; `"bfloat16"` adds up in float32.
    """

    kind: Literal["hessian", "gauss_newton", "fisher"] = "hessian"
    indefinite: Literal["absolute", "clip", "keep"] = "absolute"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        require_choices(self)

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> "FittedDense":
        """Accumulate the matrix over the stream and factorise it.

        Raises:
            TaskError: there are more than `LARGEST` parameters, or the matrix is singular.
        """
        size = sum(block.size for block in stream.plan.blocks.values())
        if size > LARGEST:
            raise TaskError(
                f"a dense curvature of {size} parameters does not fit: select fewer with layers= "
                f"(up to {LARGEST}), or use kfac, ekfac or trak"
            )
        matrix = {
            "hessian": self._hessian,
            "gauss_newton": self._gauss_newton,
            "fisher": self._fisher,
        }[self.kind](stream, function)
        matrix /= len(stream.data)
        if self.kind == "hessian":
            return self._diagonalised(stream.plan, matrix, damping)
        value = damping.value((matrix.diagonal().sum() / size).item())
        factor = _cholesky(matrix, value)
        return FittedDense(stream.plan, value, factor=factor, precision=self.precision)

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> "FittedDense":
        """From the saved factorisation."""
        return FittedDense(
            stream.plan,
            tensors["damping"].item(),
            factor=tensors.get("factor"),
            vectors=tensors.get("vectors"),
            inverse=tensors.get("inverse"),
            precision=self.precision,
        )

    def _fisher(self, stream: GradientStream, function: Function) -> Tensor:
        total: Tensor | None = None
        for _, _, gradients in stream.gradients(function, "second moments"):
            for rows in flat(gradients, stream.plan):
                total = rows.new_zeros(rows.shape[1], rows.shape[1]) if total is None else total
                add_gram(total, rows)
        assert total is not None
        return symmetric(total)

    def _gauss_newton(self, stream: GradientStream, function: Function) -> Tensor:
        objective = stream.task.objective
        outputs = _outputs_per_example(stream)
        total: Tensor | None = None
        for k in range(outputs):

            def part(model: Any, batch: Any, k: int = k) -> Tensor:
                out = objective.outputs(model, batch)
                root = _root_of_output_hessian(objective, out.detach(), batch)  # [b, c, c]
                return (out.flatten(1) * root[:, :, k]).sum(1)

            moment = self._fisher(stream, part)
            total = moment if total is None else total.add_(moment)
        assert total is not None
        return total

    def _hessian(self, stream: GradientStream, function: Function) -> Tensor:
        from forebear.capture import Wrapped

        task, plan = stream.task, stream.plan
        wrapped = Wrapped(task.model, function)
        names = [name for block in plan.blocks.values() for name in block.parameters]
        parameters = dict(task.model.named_parameters())
        point = torch.cat(
            [
                block.matrix({n: parameters[n].detach() for n in block.parameters}).reshape(-1)
                for block in plan.blocks.values()
            ]
        )

        def total_loss(vector: Tensor, batch: Any) -> Tensor:
            pieces = vector.split([block.size for block in plan.blocks.values()])
            chosen: dict[str, Tensor] = {}
            for piece, block in zip(pieces, plan.blocks.values(), strict=True):
                chosen |= block.split(piece.view(block.rows, block.cols))
            chosen = {f"model.{name}": chosen[name] for name in names}
            return torch.func.functional_call(wrapped, chosen, (batch,)).sum()

        rows = torch.func.jacrev(torch.func.grad(total_loss), chunk_size=64)
        total = point.new_zeros(len(point), len(point))
        with task.evaluation():
            for where, batch in stream.batches("Hessian"):
                moved = map_tensors(lambda t: t.to(task.device), batch)
                with torch.no_grad(), naming(stream.data, where):
                    require_finite(function(task.model, moved), "loss")
                total += rows(point, moved).detach()
        return 0.5 * (total + total.T)

    def _diagonalised(self, plan: Plan, matrix: Tensor, how: Damping) -> "FittedDense":
        values, vectors = torch.linalg.eigh(matrix.double())
        lowest = values[0].item()
        if self.indefinite == "absolute":
            values = values.abs()
        elif self.indefinite == "clip":
            values = values.clamp_min(0)
        # Of the eigenvalues that are used: those of an indefinite Hessian may cancel in the mean.
        damping = how.value(values.abs().mean().item())
        if self.indefinite == "keep" and lowest + damping < 0:
            warnings.warn(
                f"the Hessian's lowest eigenvalue is {lowest:.3g} and damping {damping:.3g} does "
                "not cover it: scores may have the wrong sign; use indefinite='absolute'",
                NumericalWarning,
                stacklevel=4,
            )
        shifted = values + damping
        if not shifted.abs().min() > 1e-14 * shifted.abs().max():
            raise TaskError(
                f"the damped Hessian is singular (λ = {damping:.3g}): increase the damping"
            )
        return FittedDense(
            plan,
            damping,
            vectors=vectors.to(matrix.dtype),
            inverse=(1 / shifted).to(matrix.dtype),
            precision=self.precision,
        )


@dataclass(frozen=True)
class FittedDense(Solved):
    """`(C + λI)⁻¹` as a Cholesky factor, or as eigenvectors and inverse eigenvalues."""

    plan: Plan
    damping: float
    factor: Tensor | None = None
    vectors: Tensor | None = None
    inverse: Tensor | None = None
    precision: Precision = "float32"

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
        return {key: value for key, value in parts.items() if value is not None}

    def details(self) -> dict[str, Any]:
        """One λ for all."""
        return {"damping_used": {"all": self.damping}}


def _cholesky(matrix: Tensor, damping: float) -> Tensor:
    matrix.diagonal().add_(damping)
    factor = cholesky_factor(matrix)
    if factor is None:
        factor = cholesky_factor(matrix.double())
    if factor is None:
        raise TaskError(
            f"the curvature is singular with damping λ = {damping:.3g}: it has {len(matrix)} "
            "dimensions and fewer independent gradients; increase the damping"
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


def _outputs_per_example(stream: GradientStream) -> int:
    batch = stream.data.batch(slice(0, 1))
    batch = map_tensors(lambda t: t.to(stream.task.device), batch)
    with stream.task.evaluation(), torch.no_grad():
        outputs = stream.task.objective.outputs(stream.task.model, batch)
    if outputs.numel() > 1000:
        raise TaskError(
            f"the exact Gauss-Newton matrix needs a pass for each of {outputs.numel()} outputs of "
            "an example: use kind='fisher', or ekfac, which samples targets instead"
        )
    return outputs.numel()


def _root_of_output_hessian(objective: Any, outputs: Tensor, batch: Any) -> Tensor:
    """`R` `[b, c, c]` with `R Rᵀ` the Hessian of the loss in the outputs."""

    def loss(output: Tensor, example: Any) -> Tensor:
        return objective.loss(output[None], map_tensors(lambda t: t[None], example))[0]

    hessian = torch.func.vmap(torch.func.hessian(loss))(outputs, batch)
    size = outputs[0].numel()
    values, vectors = torch.linalg.eigh(hessian.reshape(-1, size, size))
    return vectors * values.clamp_min(0).sqrt()[:, None]
