"""Any model with outputs and a loss on them, linearised at its parameters.

`H` is `n (C + λI)` with C the Gauss-Newton matrix of the mean loss, so that `H_i = J_iᵀ V_i J_i`
is the part of example i in it, of rank c. Sum convention, as in `forebear.removal.problem`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Capture
from forebear.curvature.damping import Damping
from forebear.curvature.dense import LARGEST
from forebear.curvature.solved import flat
from forebear.data import Data, map_tensors, naming, require_finite
from forebear.errors import TaskError
from forebear.removal.problem import WORKSPACE
from forebear.stream import BATCH, Stream
from forebear.task import Task

MOST_OUTPUTS = 1000


def output_derivatives(
    task: Task, data: Data, batch_size: int, description: str = "model outputs"
) -> tuple[Tensor, Tensor]:
    """First `[n, c]` and second `[n, c, c]` derivatives of the losses in the model's outputs.

    Raises:
        TaskError: the loss is a plain callable, or an example has too many outputs.
        NonFiniteError: an output or derivative is NaN or infinite.
    """
    objective = task.objective
    first, second = [], []

    def loss(output: Tensor, example: Any) -> Tensor:
        return objective.loss(output[None], map_tensors(lambda t: t[None], example))[0]

    stream = Stream(task, Plan({}, ()), data, batch_size)
    with task.evaluation():
        for rows, batch in stream.batches(description):
            moved = map_tensors(lambda t: t.to(task.device), batch)
            with torch.no_grad(), naming(data, rows):
                outputs = objective.outputs(task.model, moved)
                _require_few(outputs)
                task.losses(task.model, moved)
                require_finite(outputs, "model's output")
            size = outputs[0].numel()
            gradient = torch.func.vmap(torch.func.grad(loss))(outputs, moved)
            hessian = torch.func.vmap(torch.func.hessian(loss))(outputs, moved)
            with naming(data, rows):
                require_finite(gradient.reshape(-1, size), "loss's gradient in the outputs")
            first.append(gradient.reshape(-1, size).detach().cpu().double())
            second.append(hessian.reshape(-1, size, size).detach().cpu().double())
    return torch.cat(first), torch.cat(second)


def jacobians(task: Task, plan: Plan, capture: Capture, batch: Any, outputs: int) -> Tensor:
    """Derivatives of all outputs in the parameters, `[b, c, P]`: a pass for each output."""
    objective = task.objective

    def part(k: int) -> Tensor:
        def output(model: Any, batch: Any) -> Tensor:
            return objective.outputs(model, batch).flatten(1)[:, k]

        _, gradients = capture.gradients(output, batch)
        return torch.cat(list(flat(gradients, plan)))

    return torch.stack([part(k) for k in range(outputs)], 1).cpu()


def jacobian_batches(
    task: Task, plan: Plan, data: Data, outputs: int, batch_size: int, description: str
) -> Iterator[tuple[slice, Tensor]]:
    """Positions and Jacobians `[b, c, P]` of a dataset, in bounded memory."""
    size = sum(block.size for block in plan.blocks.values())
    step = max(1, min(batch_size, WORKSPACE // (outputs * size)))
    stream = Stream(task, plan, data, step)
    with Capture(task, plan) as capture:
        for rows, batch in stream.batches(description):
            with naming(data, rows):
                yield rows, jacobians(task, plan, capture, batch, outputs)


@dataclass(frozen=True, eq=False)
class Network:
    """A task's model, linearised: a `Problem`.

    Attributes:
        task: model and loss; only its selected layers move.
        data: the training set.
        plan: blocks of the parameters.
        damping: λ of the mean curvature, as chosen.
        batch_size: examples at a time.
    """

    task: Task
    data: Data
    plan: Plan
    damping: Damping
    batch_size: int = BATCH

    def __post_init__(self) -> None:
        if self.size > LARGEST:
            raise TaskError(
                f"removal with a dense curvature of {self.size} parameters does not fit: select "
                f"fewer with layers= (up to {LARGEST})"
            )

    @property
    def ids(self) -> np.ndarray:
        """Of the training examples."""
        return self.data.ids

    @property
    def size(self) -> int:
        """Number of selected parameters P."""
        return sum(block.size for block in self.plan.blocks.values())

    @property
    def residuals(self) -> Tensor:
        """First derivatives of the losses in the outputs, `[n, c]`."""
        return self._derivatives[0]

    @property
    def curvatures(self) -> Tensor:
        """Second derivatives, `[n, c, c]`."""
        return self._derivatives[1]

    @cached_property
    def penalty(self) -> float:
        """`n λ`."""
        mean = self._moment.diagonal().mean().item() / len(self.data)
        return len(self.data) * self.damping.value(mean)

    def hessian(self) -> Tensor:
        """`n (C + λI)`, `[P, P]`."""
        return self._moment + self.penalty_matrix()

    def penalty_matrix(self) -> Tensor:
        """`n λ I`."""
        return self.penalty * torch.eye(self.size, dtype=torch.float64)

    def jacobian(self, rows: Tensor) -> Tensor:
        """`J_i` of examples `[u]`, `[u, c, P]`."""
        with Capture(self.task, self.plan) as capture, naming(self.data, rows):
            batch = self.data.batch(rows)
            return jacobians(self.task, self.plan, capture, batch, self._outputs).double()

    def pull(self, rows: Tensor, cotangents: Tensor) -> Tensor:
        """`Σ_k J_iᵀ v_i`, `[m, P]`: one backward pass for each example that occurs."""
        flat_rows = rows.flatten()
        rows_of_v = cotangents.flatten(0, 1)
        objective = self.task.objective
        parts = []
        with Capture(self.task, self.plan) as capture:
            for start in range(0, len(flat_rows), self.batch_size):
                part = slice(start, start + self.batch_size)
                v = rows_of_v[part]

                def along(model: Any, batch: Any, v: Tensor = v) -> Tensor:
                    outputs = objective.outputs(model, batch).flatten(1)
                    return (outputs * v.to(outputs)).sum(1)

                with naming(self.data, flat_rows[part]):
                    _, gradients = capture.gradients(along, self.data.batch(flat_rows[part]))
                parts.append(torch.cat(list(flat(gradients, self.plan))).cpu().double())
        return torch.cat(parts).view(*rows.shape, self.size).sum(1)

    def gradient(self) -> Tensor:
        """`Σ_i g_i` and, where that is smaller, the gradient of a weight decay of λ: `[P]`."""
        return self._gradient

    def vector(self) -> Tensor:
        """The selected parameters, `[P]`, in the order of the plan."""
        named = dict(self.task.model.named_parameters())
        blocks = self.plan.blocks.values()
        matrices = [
            block.matrix({n: named[n].detach() for n in block.parameters}) for block in blocks
        ]
        return torch.cat([matrix.reshape(-1) for matrix in matrices]).cpu().double()

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector `[P]` as tensors by parameter name."""
        pieces = vector.split([block.size for block in self.plan.blocks.values()])
        found: dict[str, Tensor] = {}
        for piece, block in zip(pieces, self.plan.blocks.values(), strict=True):
            found |= block.split(piece.view(block.rows, block.cols))
        return found

    @property
    def _outputs(self) -> int:
        return self.residuals.shape[1]

    @cached_property
    def _derivatives(self) -> tuple[Tensor, Tensor]:
        return output_derivatives(self.task, self.data, self.batch_size)

    @cached_property
    def _gradient(self) -> Tensor:
        plain = torch.zeros(self.size, dtype=torch.float64)
        for rows in torch.arange(len(self.data)).split(self.batch_size):
            plain += self.pull(rows[None], self.residuals[rows][None])[0]
        decayed = plain + self.penalty * self.vector()
        return plain if plain.norm() < decayed.norm() else decayed

    @cached_property
    def _moment(self) -> Tensor:
        """`Σ_i J_iᵀ V_i J_i`, `[P, P]`."""
        total = torch.zeros(self.size, self.size, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(self.curvatures)
        roots = vectors * values.clamp_min(0).sqrt()[:, None]
        for rows, jacobian in self._jacobians("Gauss-Newton matrix"):
            part = (roots[rows].mT @ jacobian.double()).flatten(0, 1)
            total.addmm_(part.T, part)
        return total

    def _jacobians(self, description: str) -> Iterator[tuple[slice, Tensor]]:
        return jacobian_batches(
            self.task, self.plan, self.data, self._outputs, self.batch_size, description
        )


def _require_few(outputs: Tensor) -> None:
    if outputs[0].numel() > MOST_OUTPUTS:
        raise TaskError(
            f"an example has {outputs[0].numel()} outputs and each needs a pass over the data: up "
            f"to {MOST_OUTPUTS} are taken; use ekfac, which samples targets instead"
        )
