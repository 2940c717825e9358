"""The one equation behind every gradient method.

`score(q, z) = −(1/n) ⟨∇m(q), (C + λI)⁻¹ ∇ℓ(z)⟩`: training on z moves the parameters along −∇ℓ(z),
so an example that raises the measurement m of the query scores above zero. A method is a choice of
gradient, curvature, projection, normalisation and checkpoints; the registered ones are one line
each on top of this file.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Capture, Gradients
from forebear.curvature import Curvature, Damping, FittedCurvature, Identity, as_damping
from forebear.curvature.base import QUERY_BYTES
from forebear.data import Data
from forebear.errors import TaskError, unknown_name
from forebear.executors import Executor, Pieces, results
from forebear.gradients import joined
from forebear.methods.correction import mean_gradient, moved, require_solver, solved_lengths
from forebear.methods.fitted import Candidates, Fitted, Piece, block_name, warn_about_zeros
from forebear.methods.stretches import Stretches, own_elsewhere
from forebear.methods.training_function import (
    READY,
    QueryFunction,
    TrainingFunction,
    features_of,
)
from forebear.methods.unit_points import UnitStream
from forebear.plan import make_plan
from forebear.projections import KeptStream, ProjectedStream, Projection, projected_plan
from forebear.stream import BATCH, Result, Stream, is_elsewhere, piecewise, stretches
from forebear.task import Checkpoint, Task
from forebear.tasks.objective import SUMMARIES
from forebear.types import require_choices

FEATURE_BYTES = 2**30
"""Projected training gradients up to 1 GB are kept; larger sets are computed again when needed."""


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
                stream = fitted.open_training(i)
                fit = self.curvature.fit(stream, fitted.training_function(), damping, self.seed)
                fitted.curvatures.append(fit)
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
            fitted.curvatures.append(restored)
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


class FittedInfluence(Fitted):
    """Curvatures fitted at every checkpoint, and projected gradients where they were kept."""

    def __init__(
        self, method: Influence, task: Task, train: Data, plan: Plan, *, batch_size: int
    ) -> None:
        super().__init__(method, task, train, batch_size=batch_size)
        self.method: Influence = method
        self.units = method.units
        self.plan = plan
        self.examples = len(train)  # that a removal is one of, also where only some are faced
        self.curvatures: list[FittedCurvature] = []
        self.training: list[Stream | ProjectedStream | KeptStream] = []
        uses_checkpoints = method.checkpoints != "last" and task.checkpoints
        self.moments: tuple[Checkpoint | None, ...] = (
            task.checkpoints if uses_checkpoints else (None,)
        )
        # Where gradients are taken: at the checkpoints, unless a correction moves the parameters.
        self.training_moments = self.query_moments = self.moments
        self.mean_gradients: list[Tensor] = []
        self.step_lengths: list[float] = []
        self.feature_plan = plan
        if method.projection is not None:
            # Every checkpoint has its own projection, so that their errors average out.
            self.projections = [
                method.projection.prepare(plan, method.seed + i) for i in range(len(self.moments))
            ]
            self.feature_plan = projected_plan(self.projections[0].sizes, plan.coverage)

    def with_damping(self, damping: float | Damping) -> "FittedInfluence":
        """The same fit with another damping: no pass over the data, no new eigenvectors.

        Raises:
            TaskError: the method has no damping.
        """
        chosen = as_damping(damping)
        again = copy.copy(self)
        again.method = replace(self.method, damping=damping)
        again.curvatures = [_damped(fit, chosen) for fit in self.curvatures]
        if self.mean_gradients:
            again.find_steps()
        return again

    def find_steps(self) -> None:
        """Where the damped quadratic model of the training loss has its minimum."""
        if not self.mean_gradients:
            for checkpoint, stream in zip(self.moments, self.training, strict=True):
                with self.task.at(checkpoint):
                    self.mean_gradients.append(mean_gradient(stream, self.training_function()))
        steps, points = [], []
        for checkpoint, fit, gradient in zip(
            self.moments, self.curvatures, self.mean_gradients, strict=True
        ):
            solver = require_solver(fit, f"correction={self.method.correction!r}")
            steps.append(-solver.solve(gradient[None])[0])
            with self.task.at(checkpoint):
                points.append(moved(self.task, self.plan, steps[-1], checkpoint))
        self.step_lengths = [step.norm().item() for step in steps]
        self.training_moments = tuple(points)
        if self.method.correction == "both":
            self.query_moments = self.training_moments

    @property
    def coverage(self) -> float:
        """Share of the trainable parameters seen."""
        return self.plan.coverage

    def details(self) -> dict[str, Any]:
        """Damping used, parameters of the fallback, and parameters that were not seen."""
        found: dict[str, Any] = {}
        each = [fit.details() for fit in self.curvatures]
        for key in each[0] if each else ():
            values = [one[key] for one in each]
            found[key] = values if len(values) > 1 else values[0]
        if self.step_lengths:
            found["correction_length"] = (
                self.step_lengths if len(self.step_lengths) > 1 else self.step_lengths[0]
            )
        if self.plan.fallback:
            found["differentiated_one_by_one"] = list(self.plan.fallback)
        if self.plan.unseen:
            found["unseen"] = list(self.plan.unseen)
        return found

    def training_function(self) -> TrainingFunction:
        """What is differentiated on training examples."""
        return TrainingFunction(self.task, self.method.gradient)

    @property
    def query_function(self) -> QueryFunction:
        """What is differentiated on queries, signed so that proponents score positive."""
        return QueryFunction(self.task, self.method.gradient)

    def stream(
        self, i: int, data: Data, executor: Executor | None = None
    ) -> Stream | ProjectedStream:
        """The gradients of a dataset at checkpoint i, projected when the method projects."""
        kind = UnitStream if self.method.points == "unit" else Stream
        stream = kind(self.task, self.plan, data, self.batch_size, executor)
        if self.method.projection is None:
            return stream
        return ProjectedStream(stream, self.projections[i], self.feature_plan)

    def open_training(self, i: int) -> Stream | ProjectedStream | KeptStream:
        """The training set at checkpoint i; projected gradients are kept when they fit."""
        stream = self.stream(i, self.train, self.executor)
        keeps = 4 * self._feature_size() * len(self.train) <= FEATURE_BYTES
        if self.method.projection is None or not keeps:
            self.training.append(stream)
            return stream
        features, weights = None, torch.ones(len(self.train))
        compute = partial(features_of, self.method.gradient)
        for rows, found in piecewise(stream, compute, "projected gradients"):
            if features is None:
                features = found["features"].new_empty(len(self.train), self._feature_size())
                weights = weights.to(features)
            features[rows], weights[rows] = found["features"], found["weights"]
        assert features is not None
        return self.keep(features, weights)

    def keep(self, features: Tensor, weights: Tensor) -> KeptStream:
        """Use projected gradients `[n, k]` for the next checkpoint."""
        kept = KeptStream(self.task, self.train, self.feature_plan, features, weights)
        self.training.append(kept)
        return kept

    def restricted(self, positions: Tensor) -> Self:
        """The same curvature, with gradients of the examples at `positions` only."""
        part = self.on(None)
        part.train = self.train.select(positions)
        part.training = [
            part.stream(i, part.train)
            if isinstance(stream, Stream | ProjectedStream)
            else stream.select(part.train, positions)
            for i, stream in enumerate(self.training)
        ]
        return part

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """Scores of all pairs, a group of queries and a batch of examples at a time."""
        for rows in self._groups(queries):
            for columns, values in self.against_training(self._prepared(queries.slice(rows))):
                yield rows, columns, values

    def blocks(self, queries: Data, kept: Pieces | None = None) -> Iterator[Piece]:
        """Scores of all pairs, a group of queries and a stretch of examples at a time."""
        if not self._computes or (kept is None and not is_elsewhere(self.executor)):
            yield from super().blocks(queries, kept)
            return
        for rows, columns, found in self._by_stretch(queries, None, kept):
            yield rows, columns, found["scores"]

    def candidates(self, queries: Data, k: int, sign: float) -> Iterator[Candidates]:
        """The `k` largest scores of every stretch, where those are worked out elsewhere."""
        if not self._computes or not is_elsewhere(self.executor):
            yield from super().candidates(queries, k, sign)
            return
        for rows, _, found in self._by_stretch(queries, (k, sign)):
            yield rows, found["values"], found["positions"]

    def self_influence(self) -> Tensor:
        """`gᵀ (C + λI)⁻¹ g` of each example in the method's units, `[n]`, in one pass."""
        if self._computes and is_elsewhere(self.executor):
            return own_elsewhere(self, self.executor)
        out: Tensor | None = None
        for columns, weights, gradients in self.training_pass("self-influence"):
            norms = [
                self._own(fit, g) * self.share(i)
                for i, (fit, g) in enumerate(zip(self.curvatures, gradients, strict=True))
            ]
            values = torch.stack(norms).sum(0)
            out = values.new_empty(len(self.train), device="cpu") if out is None else out
            out[columns] = (values * weights).cpu()
        assert out is not None
        return out * self.scale

    def tensors(self) -> dict[str, Tensor]:
        """The curvatures' state and the kept features, by checkpoint."""
        found: dict[str, Tensor] = {}
        for i, (fit, stream) in enumerate(zip(self.curvatures, self.training, strict=True)):
            found |= {f"{i}:{key}": value for key, value in fit.tensors().items()}
            if isinstance(stream, KeptStream):
                found |= {f"{i}:features": stream.features, f"{i}:weights": stream.weights}
            if self.mean_gradients:
                found[f"{i}:mean_gradient"] = self.mean_gradients[i]
        return found

    def _feature_size(self) -> int:
        return sum(block.size for block in self.feature_plan.blocks.values())

    def _own(self, fit: FittedCurvature, gradients: Gradients) -> Tensor:
        """Products of gradients with themselves, normalised, `[b]`."""
        norms = fit.squared_norms(gradients)
        if self.method.normalise == "cosine":
            return (norms > 0).to(norms)
        if self.method.normalise == "relative":
            return norms.clamp_min(0).sqrt()
        if self.method.normalise == "relative_parameters":
            lengths = self._lengths(fit, gradients)
            return norms / lengths.clamp_min(torch.finfo(norms.dtype).tiny)
        return norms

    def _lengths(self, fit: FittedCurvature, gradients: Gradients) -> Tensor:
        """What scores of training examples are divided by, `[b]`."""
        if self.method.normalise == "relative_parameters":
            solver = require_solver(fit, "normalise='relative_parameters'")
            lengths = solved_lengths(solver, gradients, self.feature_plan)
        else:
            lengths = fit.squared_norms(gradients).clamp_min(0).sqrt()
        warn_about_zeros(lengths, "training examples")
        return lengths

    def share(self, i: int) -> float:
        """Weight of checkpoint i in a sum over checkpoints."""
        if self.method.checkpoints == "mean":
            return 1.0 / len(self.moments)
        checkpoint = self.moments[i]
        return 1.0 if checkpoint is None else checkpoint.learning_rate

    @property
    def scale(self) -> float:
        """What products are multiplied by."""
        return 1.0 / self.examples if self.method.units == "removal" else 1.0

    @property
    def _computes(self) -> bool:
        """Whether gradients of training examples are computed anew: not where they are at hand."""
        return all(isinstance(stream, Stream | ProjectedStream) for stream in self.training)

    def _by_stretch(
        self, queries: Data, top: tuple[int, float] | None, kept: Pieces | None = None
    ) -> Iterator[tuple[slice, slice, Result]]:
        """Query and training positions, and what `Stretches` finds, from wherever that is done."""
        columns = stretches(len(self.train))
        for rows in self._groups(queries):
            names = [block_name(rows, each) for each in columns]
            prepared = None
            if kept is None or not all(kept.has(name) for name in names):
                prepared = self._prepared(queries.slice(rows))
            work = Stretches(self.on(None), prepared, queries.ids[rows], tuple(columns), top)
            found = results(work, names, "scores", pieces=kept, executor=self.executor)
            for each, result in zip(columns, found, strict=True):
                yield rows, each, result

    def _groups(self, queries: Data) -> Iterator[slice]:
        """Positions of as many queries as fit into memory once prepared."""
        if self.method.projection is not None:
            each = 4 * self._feature_size()
        else:
            with Capture(self.task, self.plan) as capture:
                _, one = capture.gradients(self.query_function, queries.batch(slice(0, 1)))
            each = self.curvatures[0].query_bytes(one, len(queries))
        step = max(1, min(len(queries), QUERY_BYTES // (each * len(self.moments))))
        for start in range(0, len(queries), step):
            yield slice(start, min(start + step, len(queries)))

    def _prepared(self, group: Data) -> list[tuple[Any, Tensor]]:
        return [self._prepare(i, group) for i in range(len(self.moments))]

    def _prepare(self, i: int, group: Data) -> tuple[Any, Tensor]:
        """Prepared queries of a group and their lengths in the metric, `[q]`."""
        fit = self.curvatures[i]
        with self.task.at(self.query_moments[i]):
            stream = self.stream(i, group)
            parts = [g for _, _, g in stream.gradients(self.query_function, "queries")]
        gradients = joined(parts)
        lengths = torch.ones(())
        if self.method.normalise == "cosine":
            lengths = fit.squared_norms(gradients).sqrt()
            warn_about_zeros(lengths, "queries")
        return fit.prepare(gradients), lengths

    def against_training(
        self, prepared: list[tuple[Any, Tensor]]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Training positions and scores `[q, b]` of prepared queries, batch by batch."""
        for columns, weights, gradients in self.training_pass("scores"):
            total: Tensor | None = None
            for i, (fit, g) in enumerate(zip(self.curvatures, gradients, strict=True)):
                ready, lengths = prepared[i]
                part = fit.products(ready, g)
                if self.method.normalise != "none":
                    others = self._lengths(fit, g)
                    by = lengths[..., None] * others
                    part /= by.clamp_min(torch.finfo(part.dtype).tiny)
                share = self.share(i)
                part = part if share == 1.0 else part.mul_(share)
                total = part if total is None else total.add_(part)
            assert total is not None
            if self.method.gradient == "output":
                total *= weights
            scale = self.scale
            yield columns, total if scale == 1.0 else total.mul_(scale)

    def finished(self, scores: Tensor, columns: slice) -> Tensor:
        """What a subclass makes of the scores `[..., b]` of the equation."""
        return scores

    def training_pass(self, description: str) -> Iterator[tuple[slice, Tensor, list[Gradients]]]:
        """Training positions, weights `[b]`, and gradients at every checkpoint, batch by batch."""
        function = self.training_function()
        if len(self.moments) == 1:
            stream = self.training[0]
            with self.task.at(self.training_moments[0]):
                for columns, values, g in stream.gradients(function, description):
                    kept = isinstance(stream, KeptStream)
                    yield columns, values if kept else function.weights, [g]
            return
        for columns, _ in self.training[0].batches(description):
            gradients, weights = [], []
            for checkpoint, stream in zip(self.training_moments, self.training, strict=True):
                kept = isinstance(stream, KeptStream)
                with self.task.at(None if kept else checkpoint):
                    values, g = stream.at(columns, function)
                gradients.append(g)
                weights.append(values if kept else function.weights)
            # TRAK averages the weights over checkpoints apart from the products.
            yield columns, torch.stack(weights).mean(0), gradients


def _require_second_moments(curvature: Any) -> None:
    """Projected gradients are kept as they are, so C can be nothing but their second moment."""
    curvature = getattr(curvature, "dense", curvature)
    for option, needed in (("kind", "fisher"), ("targets", "empirical")):
        if getattr(curvature, option, needed) != needed:
            raise TaskError(
                f"{option}={getattr(curvature, option)!r} is not known for projected gradients: "
                f"use {option}={needed!r}, or no projection"
            )


def _damped(fit: Any, damping: Damping) -> FittedCurvature:
    if not hasattr(fit, "with_damping"):
        raise TaskError(
            f"{type(fit).__name__} has no damping to change: use a method with a curvature"
        )
    return fit.with_damping(damping)
