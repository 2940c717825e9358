"""Attribution by unlearning: forget the query, and see which training examples suffer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forebear.curvature import Damping, Diagonal, Kronecker, as_damping
from forebear.data import Data
from forebear.errors import TaskError, unknown_name
from forebear.executors import Executor
from forebear.methods.influence import Influence
from forebear.methods.unlearned import FittedUnlearning
from forebear.methods.unlearning_step import Box
from forebear.plan import make_plan
from forebear.sharding import require_whole
from forebear.stream import BATCH
from forebear.task import Task
from forebear.tasks.diffusion import Denoising
from forebear.tasks.schedules import Level

CURVATURES: dict[str, Kronecker | Diagonal] = {
    "ekfac": Kronecker(targets="empirical", rank=None),
    "diagonal": Diagonal(targets="empirical"),
}
"""By name; the inverse is applied to few vectors, so that its low-rank form is not needed."""


def AbU(
    *,
    curvature: str | Kronecker | Diagonal = "ekfac",
    damping: float | Damping = 0.1,
    mode: Literal["linear", "step", "auto"] = "linear",
    change: float = 0.003,
    alpha: float | None = None,
    steps: int = 1,
    levels: int | Sequence[Level] | None = None,
    draws: int | None = None,
    query_draws: int = 4096,
    fisher_draws: int = 5,
    flips: Literal["none", "max", "mean"] = "none",
    box: Box | None = None,
    location: float = -1.2,
    spread: float = 1.2,
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> "Unlearning":
    """Attribution by unlearning (Wang et al. 2024), AbU+ with EK-FAC (Wang et al. 2025).

    Args:
        curvature: F, the Fisher matrix at the true noise: `"ekfac"` (AbU+), `"diagonal"` (AbU), or
            a `Kronecker` or `Diagonal` curvature.
        damping: λ; a number is relative to the mean eigenvalue of each block.
        mode: `"step"` changes the weights and measures losses again; `"linear"` is the limit of
            small steps, one pass for all queries; `"auto"` makes steps for up to four queries.
        change: length of the whole step, relative to the weights that change.
        alpha: how many times the query is unlearned, in place of `change`: a step is α / n times
            the preconditioned gradient.
        steps: in `"step"` mode, each with the gradient at the weights that the last one led to.
        levels: at which losses of training examples are compared; those of the task when None.
        draws: of noise at each of them; as the task has when None.
        query_draws: random levels and noises for the gradient of a query at each step.
        fisher_draws: the same for each training example in F.
        flips: also compare mirrored training images, and take the `"max"` or `"mean"` of both.
        box: unlearn these pixels only: first row and column, and those after the last.
        location: mean of the logarithm of random noise scales, as in training; timesteps of a
            `Discrete` schedule are all as likely.
        spread: its standard deviation.
        layers: change the weights of these layers only, such as `("*.attn2.to_k", "*.attn2.to_v")`.
        seed: of random levels and noises.
    """
    if isinstance(curvature, str):
        if curvature not in CURVATURES:
            raise unknown_name("curvature of AbU", curvature, CURVATURES)
        curvature = CURVATURES[curvature]
    chosen = levels if levels is None or isinstance(levels, int) else tuple(levels)
    return Unlearning(
        name="abu",
        curvature=curvature,
        damping=damping,
        units="removal",
        layers=layers,
        seed=seed,
        mode=mode,
        change=change,
        alpha=alpha,
        steps=steps,
        levels=chosen,
        draws=draws,
        query_draws=query_draws,
        fisher_draws=fisher_draws,
        flips=flips,
        box=box,
        location=location,
        spread=spread,
    )


@dataclass(frozen=True, kw_only=True)
class Unlearning(Influence):
    """The loss of each training example after the query was unlearned, minus that before.

    With `θ₋ = θ + (α/n) (F + λI)⁻¹ ∇L(q)` the score is `(L(z, θ₋) − L(z, θ)) / α`, whose limit for
    small α is influence, `(1/n) ⟨∇L(q), (F + λI)⁻¹ ∇L(z)⟩`. Attributes are those of `AbU`.
    """

    mode: Literal["linear", "step", "auto"] = "linear"
    change: float = 0.003
    alpha: float | None = None
    steps: int = 1
    levels: int | tuple[Level, ...] | None = None
    draws: int | None = None
    query_draws: int = 4096
    fisher_draws: int = 5
    flips: Literal["none", "max", "mean"] = "none"
    box: Box | None = None
    location: float = -1.2
    spread: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.curvature, Kronecker | Diagonal):
            raise TaskError(
                f"curvature is a {type(self.curvature).__name__}: a step needs 'ekfac', "
                "'diagonal', or a Kronecker or Diagonal curvature"
            )
        for option in ("steps", "query_draws", "fisher_draws"):
            if getattr(self, option) < 1:
                raise TaskError(f"{option} is {getattr(self, option)}: it must be at least 1")
        if self.steps > 1 and self.mode != "step":
            raise TaskError(f"steps is {self.steps}: mode={self.mode!r} knows one; use mode='step'")
        for option in ("change", "alpha"):
            value = getattr(self, option)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise TaskError(f"{option} is {value}: a step must be longer than 0")
        if not (math.isfinite(self.location) and math.isfinite(self.spread) and self.spread >= 0):
            raise TaskError(
                f"location is {self.location} and spread {self.spread}: noise scales need finite "
                "ones, and a spread of at least 0; use those of loss.training(...)"
            )
        if self.box is not None:
            top, left, bottom, right = self.box
            if not (0 <= top < bottom and 0 <= left < right):
                raise TaskError(
                    f"box={self.box} is empty: give the first row and column, and then the row and "
                    "column after the last"
                )

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "FittedUnlearning":
        """Estimate the Fisher matrix, at random levels and noises where the loss has them."""
        data = Data.of(train, ids=ids, collate=task.collate)
        fitted = self._unfitted(task, data, batch_size)
        fitted.executor = executor
        fitted.open_training(0)
        stream, function = fitted.fisher()
        damping = as_damping(self.damping)
        fitted.curvatures.append(self.curvature.fit(stream, function, damping, self.seed))
        return fitted

    def _unfitted(self, task: Task, data: Data, batch_size: int) -> "FittedUnlearning":
        require_whole(task.model)
        if self.layers is not None:
            task = task.select(self.layers)
        task = self._at_levels(task)
        return FittedUnlearning(self, task, data, make_plan(task, data), batch_size=batch_size)

    def _at_levels(self, task: Task) -> Task:
        """The task with the losses that are compared.

        Raises:
            TaskError: an option is about images or their noise, and the loss is not.
        """
        loss = task.loss
        if not isinstance(loss, Denoising):
            for option, unset in (("levels", None), ("draws", None), ("flips", "none")):
                if getattr(self, option) != unset:
                    raise TaskError(
                        f"{option}={getattr(self, option)!r} is for images with noise, and the "
                        "loss is not fb.losses.Denoising: leave it out"
                    )
        if self.box is not None and (task.measure or not isinstance(loss, Denoising)):
            raise TaskError(
                f"box={self.box} restricts the denoising loss of a query, and the task measures "
                "something else: leave it out"
            )
        if not isinstance(loss, Denoising) or (self.levels is None and self.draws is None):
            return task
        again = task.select(task.layers)
        again.loss = loss.at(self.levels or loss.levels, draws=self.draws)
        return again
