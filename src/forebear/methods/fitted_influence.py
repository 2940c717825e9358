"""What answers queries by the one equation: curvatures, and gradients of the training set."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Capture, Gradients
from forebear.curvature import (
    Damping,
    Dense,
    FittedCurvature,
    GramSpectrum,
    Identity,
    Whole,
    as_damping,
)
from forebear.curvature.base import QUERY_BYTES
from forebear.curvature.span import FittedSpan
from forebear.data import Data
from forebear.errors import TaskError
from forebear.executors import Executor, Pieces, results
from forebear.gradients import joined
from forebear.methods.correction import mean_gradient, moved, require_solver, solved_lengths
from forebear.methods.fitted import Candidates, Fitted, Piece, block_name, warn_about_zeros
from forebear.methods.stretches import Stretches, own_elsewhere
from forebear.methods.training_function import QueryFunction, TrainingFunction, features_of
from forebear.methods.unit_points import UnitStream
from forebear.projections import KeptStream, ProjectedStream, projected_plan
from forebear.stream import (
    WORKING_BYTES,
    Result,
    Stream,
    is_elsewhere,
    piecewise,
    stretches,
)
from forebear.task import Checkpoint, Task

if TYPE_CHECKING:
    from forebear.methods.influence import Influence

FEATURE_BYTES = 2**30
"""Projected training gradients up to 1 GB are kept; larger sets are computed again when needed."""


class FittedInfluence(Fitted):
    """Curvatures fitted at every checkpoint, and projected gradients where they were kept."""

    def __init__(
        self, method: "Influence", task: Task, train: Data, plan: Plan, *, batch_size: int
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
        stream = kind(self.task, self.plan, data, self.batch_size, executor, self._writes)
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

    def add(self, fit: FittedCurvature) -> None:
        """The curvature at the checkpoint whose training set was opened last.

        One that knows the training gradients by their coordinates takes the place of their stream.
        """
        self.curvatures.append(fit)
        if isinstance(fit, FittedSpan):
            span = fit.span
            self.training[-1] = KeptStream(
                self.task, self.train, span.coordinate_plan, span.coordinates, span.weights
            )

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
            if isinstance(stream, KeptStream) and not isinstance(fit, FittedSpan):
                found |= {f"{i}:features": stream.features, f"{i}:weights": stream.weights}
            if self.mean_gradients:
                found[f"{i}:mean_gradient"] = self.mean_gradients[i]
        return found

    @property
    def _writes(self) -> bool:
        """Whether inner products are all that is taken: those of factors are the same.

        K-FAC takes second moments of the factors, and projections are made for them.
        """
        products = isinstance(self.method.curvature, Dense | GramSpectrum | Identity | Whole)
        return products and self.method.projection is None

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
            inside = isinstance(fit, FittedSpan)
            plan = fit.span.coordinate_plan if inside else self.feature_plan
            lengths = solved_lengths(solver, gradients, plan)
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
        if self.method.projection is None:  # factors of a group are joined before it is prepared
            held = self.plan.held
            kept = 2 * (held.written if self._writes else held.factors)
            step = max(1, min(step, WORKING_BYTES // max(kept, 1)))
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


def _damped(fit: Any, damping: Damping) -> FittedCurvature:
    if not hasattr(fit, "with_damping"):
        raise TaskError(
            f"{type(fit).__name__} has no damping to change: use a method with a curvature"
        )
    return fit.with_damping(damping)
