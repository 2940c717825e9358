"""What iterative solvers share: an operator, a damping, a preconditioner, and their residuals."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.curvature.base import GradientStream
from forebear.curvature.damping import Absolute, Damping, Relative
from forebear.curvature.kronecker import FittedKronecker, Kronecker
from forebear.curvature.operator import Kind, Operator, curvature_operator
from forebear.curvature.solved import Solved
from forebear.differentiation import Function
from forebear.errors import TaskError
from forebear.stream import Stream
from forebear.tasks.objective import Objective

Linear = Callable[[Tensor], Tensor]
"""A linear map of each row of `[m, P]`."""

Preconditioner = Literal["none", "ekfac"]

WORKING = 6  # vectors of P numbers that a solver holds for each right-hand side
SOLVE_BYTES = 2**28
"""Memory for the vectors of a solve; more right-hand sides come in groups."""

EKFAC = "preconditioner:"


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        rows: `[m, P]`.
        residuals: `[m]`, `‖A x − v‖ / ‖v‖` of what is returned, formed anew; zero for v = 0.
        iterations: most that any right-hand side took.
    """

    rows: Tensor
    residuals: Tensor
    iterations: int


@dataclass
class Record:
    """The worst of all solutions so far."""

    residual: float | None = None
    iterations: int = 0

    def add(self, solution: Solution) -> None:
        """Take note of a solution."""
        worst = solution.residuals.max().item() if len(solution.residuals) else 0.0
        self.residual = max(self.residual or 0.0, worst)
        self.iterations = max(self.iterations, solution.iterations)

    def details(self) -> dict[str, Any]:
        """`residual` and `iterations`, once something was solved."""
        if self.residual is None:
            return {}
        return {"residual": self.residual, "iterations": self.iterations}


@dataclass(frozen=True)
class System:
    """`A = C + λI` by its products, and what may stand for its inverse.

    Attributes:
        kind: of the curvature C.
        operator: products with C.
        damping: λ.
        preconditioner: EK-FAC with the same λ.
    """

    kind: Kind
    operator: Operator
    damping: float
    preconditioner: FittedKronecker | None = None

    @property
    def plan(self) -> Plan:
        """Blocks of the vectors."""
        return self.operator.plan

    def apply(self, vectors: Tensor) -> Tensor:
        """`(C + λI) v` for each row of `[m, P]`."""
        return self.operator(vectors).add_(vectors, alpha=self.damping)

    def on(self, examples: Tensor) -> Linear:
        """The same with the curvature of the mean loss of some examples."""
        part = self.operator.on(examples)
        return lambda vectors: part(vectors).add_(vectors, alpha=self.damping)

    def precondition(self, vectors: Tensor) -> Tensor:
        """The approximate inverse; none leaves vectors as they are."""
        return vectors if self.preconditioner is None else self.preconditioner.solve(vectors)

    def residuals(self, solved: Tensor, rows: Tensor) -> Tensor:
        """`‖A x − v‖ / ‖v‖` of each row, `[m]`; zero where v is."""
        norms = rows.norm(dim=1)
        errors = (self.apply(solved) - rows).norm(dim=1)
        return torch.where(norms > 0, errors / norms.clamp_min(1e-300), 0.0)

    def with_damping(self, damping: Damping) -> "System":
        """The same curvature with another λ."""
        value = damping_value(self.kind, self.operator, damping)
        preconditioner = self.preconditioner
        if preconditioner is not None:
            preconditioner = preconditioner.with_damping(Absolute(value))
        return System(self.kind, self.operator, value, preconditioner)

    def tensors(self) -> dict[str, Tensor]:
        """λ and the preconditioner; the operator is built again from the data."""
        found = {"damping": torch.tensor(self.damping, dtype=torch.float64)}
        if self.preconditioner is not None:
            inner = self.preconditioner.tensors()
            found |= {EKFAC + name: value for name, value in inner.items()}
        return found


def fit_system(
    kind: Kind,
    preconditioner: Preconditioner,
    stream: GradientStream,
    function: Function,
    damping: Damping,
    seed: int,
    *,
    by_example: bool = False,
) -> System:
    """The operator, λ, and the preconditioner fitted to the same λ.

    Raises:
        TaskError: the mean eigenvalue that damping is relative to is not above zero.
    """
    operator = curvature_operator(kind, stream, function, seed=seed, by_example=by_example)
    value = damping_value(kind, operator, damping)
    fitted = None
    if preconditioner == "ekfac":
        fitted = _ekfac(kind, stream).fit(stream, function, Absolute(value), seed)
    return System(kind, operator, value, fitted)


def restore_system(
    kind: Kind,
    preconditioner: Preconditioner,
    stream: GradientStream,
    function: Function,
    tensors: dict[str, Tensor],
    *,
    by_example: bool = False,
) -> System:
    """From what `System.tensors` gave, and a pass over the data for the operator."""
    operator = curvature_operator(kind, stream, function, by_example=by_example)
    fitted = None
    if preconditioner == "ekfac":
        inner = {k.removeprefix(EKFAC): v for k, v in tensors.items() if k.startswith(EKFAC)}
        fitted = _ekfac(kind, stream).restore(stream, function, inner)
    return System(kind, operator, tensors["damping"].item(), fitted)


def damping_value(kind: Kind, operator: Operator, damping: Damping) -> float:
    """λ; the mean eigenvalue is only computed where damping is relative to it.

    Raises:
        TaskError: it is not above zero, as that of an indefinite Hessian may be.
    """
    if not isinstance(damping, Relative):
        return damping.value(1.0)
    mean = operator.mean_eigenvalue
    if mean < 0 or (mean == 0 and damping.factor > 0):
        raise TaskError(
            f"the mean eigenvalue of the {kind} is {mean:.3g}: damping cannot be relative to it; "
            "use damping=fb.Absolute(...), or curvature='gauss_newton'"
        )
    return damping.value(mean)


def _ekfac(kind: Kind, stream: GradientStream) -> Kronecker:
    # The preconditioner changes how fast a solver is, not what it finds: labels will do where
    # targets cannot be drawn.
    draws = isinstance(stream, Stream) and isinstance(stream.task.loss, Objective)
    targets = "sampled" if draws and kind != "fisher" else "empirical"
    return Kronecker(targets=targets, rank=None)


@dataclass(frozen=True)
class Implicit(Solved):
    """`(C + λI)⁻¹` by iteration, for all queries at once.

    Squared norms (self-influence) take a solve for each example, a batch of them at once.

    Attributes:
        system: what is solved.
        record: the worst residual so far.
    """

    system: System
    record: Record = field(default_factory=Record, compare=False)

    @property
    def plan(self) -> Plan:  # type: ignore[override]
        """Blocks of the vectors."""
        return self.system.plan

    @abstractmethod
    def find(self, rows: Tensor) -> Solution:
        """Solve for each row of `[m, P]`, and warn about what did not converge."""

    def solve(self, rows: Tensor) -> Tensor:
        """`(C + λI)⁻¹` applied to each row of `[m, P]`; residuals go to the record."""
        like = self.system.operator.like
        step = max(1, SOLVE_BYTES // (WORKING * like.element_size() * max(rows.shape[1], 1)))
        parts = []
        for some in rows.split(step):
            solution = self.find(some.to(like))
            self.record.add(solution)
            parts.append(solution.rows.to(rows))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def tensors(self) -> dict[str, Tensor]:
        """λ and the preconditioner."""
        return self.system.tensors()

    def details(self) -> dict[str, Any]:
        """λ and, once queries were solved for, the worst relative residual."""
        return {"damping_used": {"all": self.system.damping}, **self.record.details()}
