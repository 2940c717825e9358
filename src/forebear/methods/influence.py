"""The one equation behind every gradient method.

`score(q, z) = −(1/n) ⟨∇m(q), (C + λI)⁻¹ ∇ℓ(z)⟩`: training on z moves the parameters along −∇ℓ(z),
so an example that raises the measurement m of the query scores above zero. A method is a choice of
gradient, curvature, projection, normalisation and checkpoints; the registered ones are one line
each on top of this file.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from forebear.curvature import Curvature, Damping, FittedCurvature, Identity, as_damping
from forebear.data import Data
from forebear.errors import TaskError, unknown_name
from forebear.executors import Executor
from forebear.methods.correction import require_solver
from forebear.methods.fitted_influence import FittedInfluence
from forebear.methods.training_function import READY
from forebear.plan import make_plan
from forebear.projections import Projection
from forebear.stream import BATCH
from forebear.task import Task
from forebear.tasks.objective import SUMMARIES
from forebear.types import require_choices


@dataclass(frozen=True, kw_only=True)
class Influence:
    """Influence of training examples on queries, after Koh & Liang (2017) and what followed.

    Attributes:
        name: what results are called.
        gradient: of the training `"loss"`; of TRAK's model `"output"`, whose scores are weighted
            with the residual of each example; or of a function of what the model says that the
            task's objective knows by name, in place of the loss on both sides: `"square_norm"`
            (D-TRAK), `"mean"` or `"absolute"`.
        points: gradients of losses that average over levels of noise are their `"mean"`, or that of
            gradients scaled to `"unit"` length first, for which every level is a pass of its own.
        curvature: the matrix C; `Identity()` compares gradients as they are.
        projection: compress gradients first; C is then that of the compressed ones.
        damping: λ; a number is relative to the mean eigenvalue of each block.
        normalise: `"cosine"` divides by both gradients' lengths in the metric of C, `"relative"`
            by that of the training example alone, and `"relative_parameters"` by the length of the
            step in parameters, `(C + λI)⁻¹ ∇ℓ(z)` (RelatIF).
        checkpoints: `"last"` is the model as it is; `"sum"` weights the task's checkpoints with
            their learning rates (TracInCP), `"mean"` averages over them (TRAK).
        units: `"removal"` divides by n: the measurement with the example minus without it.
        layers: restrict the method to these layers of the task.
        seed: of projections and sampled targets.
        correction: for a model that is not at a minimum: `"training"` takes training gradients
            where the damped quadratic model of the training loss has its minimum,
            `θ − (C + λI)⁻¹ ∇R(θ)`, and `"both"` those of the queries too.
    """

    name: str = "influence"
    gradient: str = "loss"
    points: Literal["mean", "unit"] = "mean"
    curvature: Curvature = Identity()
    projection: Projection | None = None
    damping: float | Damping = 0.1
    normalise: Literal["none", "cosine", "relative", "relative_parameters"] = "none"
    checkpoints: Literal["last", "sum", "mean"] = "last"
    units: Literal["ranking", "removal"] = "ranking"
    layers: tuple[str, ...] | None = None
    seed: int = 0
    correction: Literal["none", "training", "both"] = "none"

    def __post_init__(self) -> None:
        require_choices(self)
        if self.gradient not in (*READY, *SUMMARIES):
            raise unknown_name("gradient of Influence", self.gradient, (*READY, *SUMMARIES))
        if self.points == "unit" and self.gradient == "output":
            raise TaskError("points='unit' leaves no weights for gradient='output': use 'loss'")
        if self.correction != "none" and (self.projection is not None or self.gradient != "loss"):
            raise TaskError(
                f"correction={self.correction!r} moves the parameters, which needs whole gradients "
                "of the loss: leave out projection= and gradient="
            )
        if self.projection is not None:
            _require_second_moments(self.curvature)

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "FittedInfluence":
        """Check the layers on a batch and estimate the curvature at every checkpoint.

        Passes over the training set whose results are added up or kept as features are made where
        `executor` says, and so are those for scores. Curvatures that need a pass for every
        iteration (CG, LiSSA, Arnoldi, Nyström), or keep the gradients themselves (DataInf, exact
        ones of few examples), are estimated in this process.
        """
        data = Data.of(train, ids=ids, collate=task.collate)
        fitted = self._unfitted(task, data, batch_size)
        fitted.executor = executor
        damping = as_damping(self.damping)
        for i, checkpoint in enumerate(fitted.moments):
            with fitted.task.at(checkpoint):
                stream, function = fitted.open_training(i), fitted.training_function()
                # A correction takes training gradients elsewhere, out of the span.
                moves = self.correction != "none"
                span = None if moves else getattr(self.curvature, "span", None)
                fit = None if span is None else span(stream, function, damping)
                if fit is None:
                    fit = self.curvature.fit(stream, function, damping, self.seed)
                fitted.add(fit)
        self._require_solvers(fitted.curvatures)
        if self.correction != "none":
            fitted.find_steps()
        return fitted

    def restore(self, task: Task, train: Data, tensors: dict[str, Tensor]) -> "FittedInfluence":
        """From saved tensors."""
        fitted = self._unfitted(task, train, BATCH)
        for i, checkpoint in enumerate(fitted.moments):
            parts = {
                key.removeprefix(f"{i}:"): value
                for key, value in tensors.items()
                if key.startswith(f"{i}:")
            }
            features, weights = parts.pop("features", None), parts.pop("weights", None)
            if "mean_gradient" in parts:
                fitted.mean_gradients.append(parts.pop("mean_gradient"))
            if features is not None and weights is not None:
                fitted.keep(features, weights)
            else:
                with fitted.task.at(checkpoint):
                    fitted.open_training(i)
            with fitted.task.at(checkpoint):
                restored = self.curvature.restore(
                    fitted.training[i], fitted.training_function(), parts
                )
            fitted.add(restored)
        if self.correction != "none":
            fitted.find_steps()
        return fitted

    def _require_solvers(self, curvatures: list[FittedCurvature]) -> None:
        for fit in curvatures:
            if self.normalise == "relative_parameters":
                require_solver(fit, "normalise='relative_parameters'")
            if self.correction != "none":
                require_solver(fit, f"correction={self.correction!r}")

    def _unfitted(self, task: Task, data: Data, batch_size: int) -> "FittedInfluence":
        if self.layers is not None:
            task = task.select(self.layers)
        return FittedInfluence(self, task, data, make_plan(task, data), batch_size=batch_size)


def _require_second_moments(curvature: Any) -> None:
    """Projected gradients are kept as they are, so C can be nothing but their second moment."""
    curvature = getattr(curvature, "dense", curvature)
    for option, needed in (("kind", "fisher"), ("targets", "empirical")):
        if getattr(curvature, option, needed) != needed:
            raise TaskError(
                f"{option}={getattr(curvature, option)!r} is not known for projected gradients: "
                f"use {option}={needed!r}, or no projection"
            )
