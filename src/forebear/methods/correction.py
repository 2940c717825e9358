"""Where the damped quadratic model of the training loss has its minimum."""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Gradients
from forebear.curvature.base import GradientStream
from forebear.curvature.solved import flat
from forebear.differentiation import Function
from forebear.errors import TaskError
from forebear.gradients import WORKSPACE, rows_of
from forebear.layers import Factors
from forebear.sharding import require_whole
from forebear.stream import summed
from forebear.task import Checkpoint, Task


@runtime_checkable
class Solver(Protocol):
    """A fitted curvature that can be applied to written-out vectors."""

    def solve(self, rows: Tensor) -> Tensor:
        """`(C + λI)⁻¹` applied to each row of `[m, P]`."""
        ...


def require_solver(fit: Any, wanted: str) -> Solver:
    """The fitted curvature, if it can solve.

    Raises:
        TaskError: it only forms inner products.
    """
    if isinstance(fit, Solver):
        return fit
    raise TaskError(
        f"{wanted} needs the inverse curvature as vectors, which {type(fit).__name__} does not "
        "form: use a curvature such as Kronecker, Dense, Arnoldi or ConjugateGradients"
    )


def mean_gradient(stream: GradientStream, function: Function) -> Tensor:
    """Gradient of the mean of `function` over a stream, written out, `[P]`."""
    totals = summed(stream, partial(_gradient_sums, function), "mean gradient")
    pieces = [totals[name].flatten() for name in stream.plan.blocks]
    return torch.cat(pieces) / len(stream.data)


def moved(task: Task, plan: Plan, step: Tensor, checkpoint: Checkpoint | None) -> Checkpoint:
    """The model's present weights after a step `[P]`, to be visited like a checkpoint.

    Raises:
        TaskError: the step is not finite.
    """
    if not torch.isfinite(step).all():
        raise TaskError(
            "the step to the minimum of the quadratic model is not finite: increase the damping"
        )
    changes: dict[str, Tensor] = {}
    pieces = step.split([block.size for block in plan.blocks.values()])
    for piece, block in zip(pieces, plan.blocks.values(), strict=True):
        changes |= block.split(piece.view(block.rows, block.cols))
    require_whole(task.model)
    state = {name: value.detach().clone() for name, value in task.model.state_dict().items()}
    parameters = dict(task.model.named_parameters())
    by_identity = {id(parameters[name]): change for name, change in changes.items()}
    # Every name of a tied parameter, or loading would undo the step under one of them.
    for name, parameter in task.model.named_parameters(remove_duplicate=False):
        change = by_identity.get(id(parameter))
        if change is not None and name in state:
            state[name] += change.to(state[name]).view_as(state[name])
    rate = 1.0 if checkpoint is None else checkpoint.learning_rate
    return Checkpoint(state, rate)


def solved_lengths(solver: Solver, gradients: Gradients, plan: Plan) -> Tensor:
    """Length of `(C + λI)⁻¹ g` of each gradient, `[b]`, some at a time."""
    size = sum(block.size for block in plan.blocks.values())
    count = len(next(iter(gradients.values()))[0].right)
    step = max(1, WORKSPACE // size)
    lengths = []
    for start in range(0, count, step):
        rows = slice(start, start + step)
        few = {name: rows_of(terms, rows) for name, terms in gradients.items()}
        lengths += [solver.solve(g).norm(dim=1) for g in flat(few, plan)]
    return torch.cat(lengths)


def _add_sum(total: Tensor, term: Factors) -> None:
    """Add `Σ_b Σ_t left ⊗ right` to `[rows, cols]` in one product."""
    left, right = term
    if left.is_floating_point():
        right = right.expand(*left.shape[:2], right.shape[2])
        total.addmm_(left.flatten(0, 1).T, right.flatten(0, 1))
    else:
        total.index_add_(0, left.flatten(), right.flatten(0, 1))


def _gradient_sums(function: Function, stream: GradientStream, piece: int) -> dict[str, Tensor]:
    """Gradients summed over a piece, `[rows, cols]` of every block."""
    totals: dict[str, Tensor] = {}
    for _, _, gradients in stream.gradients(function, "mean gradient"):
        for name, block in stream.plan.blocks.items():
            if name not in totals:
                totals[name] = gradients[name][0].right.new_zeros(block.rows, block.cols)
            for term in gradients[name]:
                _add_sum(totals[name], term)
    return totals
