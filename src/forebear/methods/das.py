"""Diffusion attribution score: the squared change of what the model says."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from torch import Tensor

from forebear.curvature import Damping
from forebear.data import Data
from forebear.errors import TaskError
from forebear.executors import Executor
from forebear.gradients import Precision
from forebear.methods.diffusion_gradients import (
    RIDGE,
    kernel,
    training_residuals,
)
from forebear.methods.fitted_influence import FittedInfluence
from forebear.methods.influence import Influence
from forebear.plan import make_plan
from forebear.projections import Compression
from forebear.stream import BATCH, fitting, is_elsewhere
from forebear.task import Task
from forebear.types import UNSIGNED, Provenance, TopK


def DAS(
    *,
    form: Literal["squared", "linear"] = "squared",
    function: Literal["mean", "absolute", "square_norm", "loss"] = "mean",
    points: Literal["unit", "mean"] = "unit",
    damping: float | Damping = RIDGE,
    dimension: int | None = None,
    projection: Compression = "tensor_sketch",
    precision: Precision = "float32",
    layers: tuple[str, ...] | None = None,
    seed: int = 0,
) -> "DASInfluence":
    """`(g_qᵀ (GᵀG / n + λI)⁻¹ g_z · r_z)²` (Lin et al. 2025, DAS).

    g is a mean over levels of noise of gradients of `mean ε`, each of unit length, and r the
    training residual of the example. The score estimates how far the model's output moves, not
    which way: it is not signed.

    Args:
        form: `"linear"` leaves out the square, and with it what makes the method strong; its sign
            is that of the change of the function and names neither proponents nor opponents.
        function: of the noise that the network sees.
        points: `"mean"` leaves gradients at different levels as long as they are.
        damping: this and what follows as of `DTRAK`.
        dimension: of a projection.
        projection: which one.
        precision: of products.
        layers: that are looked at.
        seed: of the projection.
    """
    return DASInfluence(
        name="das",
        form=form,
        gradient=function,
        points=points,
        **kernel(damping, dimension, projection, precision, layers, seed),
    )


@dataclass(frozen=True, kw_only=True)
class DASInfluence(Influence):
    """A kernel of unit gradients, weighted with training residuals.

    The leverage of an example, by which the derivation divides, is left out as in the authors'
    code: it is close to zero wherever there are many examples.

    Attributes:
        form: `"squared"` or `"linear"`.
    """

    form: Literal["squared", "linear"] = "squared"

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "FittedDAS":
        """Fit the kernel, and find the residual of every training example in a forward pass.

        `executor` works on the kernel and on scores; residuals are found in this process.
        """
        data = Data.of(train, ids=ids, collate=task.collate)
        fitted = super().fit(task, data, batch_size=batch_size, executor=executor)
        assert isinstance(fitted, FittedDAS)
        fitted.residuals = training_residuals(
            fitted.task, data, fitting(fitted.plan.held.pass_, batch_size)
        )
        return fitted

    def restore(self, task: Task, train: Data, tensors: dict[str, Tensor]) -> "FittedDAS":
        """From saved tensors."""
        fitted = super().restore(task, train, tensors)
        assert isinstance(fitted, FittedDAS)
        fitted.residuals = tensors["residuals"]
        return fitted

    def _unfitted(self, task: Task, data: Data, batch_size: int) -> "FittedDAS":
        if self.layers is not None:
            task = task.select(self.layers)
        return FittedDAS(self, task, data, make_plan(task, data), batch_size=batch_size)


class FittedDAS(FittedInfluence):
    """The kernel, and the residual of every training example.

    Attributes:
        residuals: `[n]`.
    """

    residuals: Tensor

    @property
    def is_squared(self) -> bool:
        """Whether scores have no sign."""
        return getattr(self.method, "form", "squared") == "squared"

    def finished(self, scores: Tensor, columns: slice) -> Tensor:
        """Scores times residuals, squared."""
        weighted = scores * self.residuals[columns].to(scores)
        return weighted.square() if self.is_squared else weighted

    def against_training(self, prepared: Any) -> Iterator[tuple[slice, Tensor]]:
        """Training positions and scores `[q, b]` of prepared queries, batch by batch."""
        for columns, values in super().against_training(prepared):
            yield columns, self.finished(values, columns)

    def self_influence(self) -> Tensor:
        """Score of each example for itself, `[n]`, in one pass."""
        found = super().self_influence()
        if self._computes and is_elsewhere(self.executor):  # finished there, piece by piece
            return found
        return self.finished(found, slice(0, len(found)))

    def top(self, queries: Any, k: int = 10, *, opponents: bool = False, ids: Any = None) -> TopK:
        """The `k` examples of each query that move the model's output most.

        Raises:
            TaskError: opponents were asked for, and scores are squared.
        """
        if opponents and self.is_squared:
            raise TaskError(
                "das squares its scores, so there are no opponents among them: ask dtrak or trak, "
                "whose scores have a sign"
            )
        return super().top(queries, k, opponents=opponents, ids=ids)

    def restricted(self, positions: Tensor) -> Self:
        """The same kernel, with the residuals at `positions` only."""
        part = super().restricted(positions)
        part.residuals = self.residuals[positions]
        return part

    def tensors(self) -> dict[str, Tensor]:
        """The kernel's state and the residuals."""
        return {**super().tensors(), "residuals": self.residuals}

    def _provenance(self, queries: Data) -> Provenance:
        about = super()._provenance(queries)
        return replace(about, sign=UNSIGNED) if self.is_squared else about
