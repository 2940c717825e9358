"""Newton steps for single examples: influence that takes the example out of the curvature too."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from forebear.capture import Capture, Gradients
from forebear.curvature import Damping, Dense
from forebear.data import Data, naming
from forebear.executors import Executor
from forebear.methods.fitted_influence import FittedInfluence
from forebear.methods.influence import Influence
from forebear.plan import make_plan
from forebear.removal.estimators import corrected_residuals
from forebear.removal.network import jacobian_batches, output_derivatives
from forebear.stream import BATCH
from forebear.task import Task


def NewtonStep(
    *, damping: float | Damping = 1.0, layers: tuple[str, ...] | None = None
) -> "NewtonInfluence":
    """`−(1/n) ∇m(q)ᵀ (C + λI − H_i/n)⁻¹ ∇ℓ_i`, with C the exact Gauss-Newton matrix.

    Rescaled influence of single examples (Rubinstein & Hopkins 2025), which for one example is the
    Newton step; exact leave-one-out for least squares.

    Args:
        damping: λ; a number is relative to the mean eigenvalue.
        layers: restrict the method to these layers; up to 20,000 parameters.
    """
    return NewtonInfluence(
        name="newton_step",
        curvature=Dense(kind="gauss_newton"),
        damping=damping,
        units="removal",
        layers=layers,
    )


@dataclass(frozen=True, kw_only=True)
class NewtonInfluence(Influence):
    """Influence with a dense Gauss-Newton matrix that each example is taken out of in turn.

    With `g_i = J_iᵀ r_i`, `H_i = J_iᵀ V_i J_i` and `K_i = J_i (C + λI)⁻¹ J_iᵀ / n` the score is
    that of exact influence with `(I − V_i K_i)⁻¹ r_i` in place of the residual `r_i`: the pass
    over the training set costs what it does there.
    """

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "FittedNewtonStep":
        """Form and factorise the curvature, and find every example's part in it.

        `executor` forms the curvature and scores; each example's part is found in this process.
        """
        data = Data.of(train, ids=ids, collate=task.collate)
        derivatives = output_derivatives(task, data, batch_size)
        fitted = super().fit(task, data, batch_size=batch_size, executor=executor)
        assert isinstance(fitted, FittedNewtonStep)
        fitted.correct(*derivatives)
        return fitted

    def restore(self, task: Task, train: Data, tensors: dict[str, Tensor]) -> "FittedNewtonStep":
        """From saved tensors."""
        fitted = super().restore(task, train, tensors)
        assert isinstance(fitted, FittedNewtonStep)
        fitted.corrected, fitted.own = tensors["corrected"], tensors["own"]
        return fitted

    def _unfitted(self, task: Task, data: Data, batch_size: int) -> "FittedNewtonStep":
        if self.layers is not None:
            task = task.select(self.layers)
        return FittedNewtonStep(self, task, data, make_plan(task, data), batch_size=batch_size)


class FittedNewtonStep(FittedInfluence):
    """The curvature and the corrected residual of every training example.

    Attributes:
        corrected: `[n, c]`, what is pulled back through the model instead of the loss gradient.
        own: self-influence, `[n]`.
    """

    corrected: Tensor
    own: Tensor

    def with_damping(self, damping: float | Damping) -> "FittedNewtonStep":
        """The same fit with another damping; leverages change with it, so examples are seen again.

        Raises:
            TaskError: the damping does not make the curvature positive.
        """
        again = super().with_damping(damping)
        assert isinstance(again, FittedNewtonStep)
        again.correct(*output_derivatives(self.task, self.train, self.batch_size))
        return again

    def correct(self, residuals: Tensor, curvatures: Tensor) -> None:
        """Find the corrected residuals: a pass for each model output, and solves for all rows.

        Args:
            residuals: first derivatives of the losses in the outputs, `[n, c]`.
            curvatures: second derivatives, `[n, c, c]`.
        """
        n, outputs = residuals.shape
        kernels = residuals.new_empty(n, outputs, outputs)
        for rows, jacobian in jacobian_batches(
            self.task, self.plan, self.train, outputs, self.batch_size, "leverages"
        ):
            kernels[rows] = _inner(self.curvatures[0], jacobian).double() / n
        kernels = 0.5 * (kernels + kernels.mT)
        self.corrected = corrected_residuals(residuals, curvatures, kernels)
        self.own = torch.einsum("na,nab,nb->n", residuals, kernels, self.corrected)

    def restricted(self, positions: Tensor) -> Self:
        """The same curvature, with the corrected residuals at `positions` only."""
        part = super().restricted(positions)
        part.corrected, part.own = self.corrected[positions], self.own[positions]
        return part

    def self_influence(self) -> Tensor:
        """Score of each example for its own loss, `[n]`."""
        return self.own

    def tensors(self) -> dict[str, Tensor]:
        """The curvature's state and the corrected residuals."""
        return {**super().tensors(), "corrected": self.corrected, "own": self.own}

    def training_pass(self, description: str) -> Iterator[tuple[slice, Tensor, list[Gradients]]]:
        """Positions, weights of one, and corrected gradients, batch by batch."""
        objective, one = self.task.objective, torch.ones(())
        with Capture(self.task, self.plan) as capture:
            for rows, batch in self.training[0].batches(description):

                def along(model: Any, batch: Any, rows: slice = rows) -> Tensor:
                    outputs = objective.outputs(model, batch).flatten(1)
                    return (outputs * self.corrected[rows].to(outputs)).sum(1)

                with naming(self.train, rows):
                    _, gradients = capture.gradients(along, batch)
                yield rows, one, [gradients]


def _inner(curvature: Any, jacobian: Tensor) -> Tensor:
    """`J (C + λI)⁻¹ Jᵀ` of each example's `J` `[b, c, P]`, `[b, c, c]`."""
    rows = jacobian.flatten(0, 1)
    factor = getattr(curvature, "factor", None)
    if factor is None:
        return jacobian @ curvature.solve(rows).view_as(jacobian).mT
    # Half a solve is enough for an inner product, and is symmetric.
    half = torch.linalg.solve_triangular(factor, rows.to(factor.dtype).T, upper=False)
    half = half.T.contiguous().view_as(jacobian)
    return half @ half.mT
