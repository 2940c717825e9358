"""Ground truth: what queries measure under models that were really retrained."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forebear.data import Data
from forebear.descriptions import describe
from forebear.errors import DataError, FormatError, NonFiniteError, TaskError
from forebear.executors import Executor, Pieces, results, write_tensors
from forebear.progress import track
from forebear.task import Loss, state_hash
from forebear.training.ensemble import evaluate_model
from forebear.training.recipe import Recipe, name_of
from forebear.training.subsets import subset_masks
from forebear.types import Provenance, Scores, read_json, read_tensors, write_json

Trainer = Recipe | Callable[[Tensor, int], nn.Module]
"""A recipe, or any `(subset, seed) -> model` with a boolean mask `[n]` as subset."""

Kind = Literal["subsets", "leave_one_out"]

PIECE = 50
"""Retrainings in one file: what an interruption can cost."""


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Measurements of every query under models retrained on subsets of the training set.

    Attributes:
        subsets: bool `[m, n]`, the examples that each model was trained on.
        outcomes: `[seeds, m, q]`, the measurement of each query.
        full: `[seeds, q]`, the same for models trained on everything; None when not asked for.
        kind: `"leave_one_out"` when every subset lacks one example.
        seeds: of the retrainings.
        train: fingerprint of the training set.
        queries: fingerprint of the queries.
        model: hash of the attributed model; empty when it was not given.
        measure: name of the measurement.
        recipe: settings of the recipe.
        recipe_hash: its fingerprint.
        version: of forebear.
        measured: description of the measurement; None in files of earlier versions.
    """

    subsets: Tensor
    outcomes: Tensor
    full: Tensor | None = None
    seeds: tuple[int, ...]
    kind: Kind = "subsets"
    train: str
    queries: str
    model: str = ""
    measure: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_hash: str = ""
    version: str = ""
    measured: Any = None

    @classmethod
    def collect(
        cls,
        recipe: Trainer,
        train: Any,
        queries: Any,
        *,
        subsets: Any,
        seeds: int | Sequence[int] = 2,
        measure: Loss | None = None,
        model: nn.Module | None = None,
        loss: Loss | None = None,
        full: bool = True,
        folder: str | Path | None = None,
        executor: Executor | None = None,
    ) -> "GroundTruth":
        """Retrain on every subset with every seed and measure every query.

        Args:
            recipe: how to train; or a callable `(subset, seed) -> model`.
            train: training set.
            queries: what is measured.
            subsets: boolean masks `[m, n]`.
            seeds: how many, or which. Averaging over seeds takes luck out of the outcomes.
            measure: `measure(model, batch) -> [b]`; minus the loss when left out.
            model: the attributed model, so that scores of another one are refused.
            loss: needed with a callable that comes without a loss or measure.
            full: also train on everything, once a seed.
            folder: where pieces of the work are kept; what is there is not done again.
            executor: where to retrain; in this process when left out.

        Raises:
            TaskError: there is no loss to measure, or it draws new noise at every visit.
            MismatchError: the folder belongs to another recipe, data set or choice of subsets.
            NonFiniteError: an outcome is NaN or infinite.
        """
        train, queries = Data.of(train), Data.of(queries)
        masks = subset_masks(subsets, len(train))
        chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(s) for s in seeds)
        if not chosen or len(set(chosen)) < len(chosen):
            raise DataError(f"seeds are {chosen}: give at least one, all different")
        loss = loss or (recipe.loss if isinstance(recipe, Recipe) else None)
        if measure is None and getattr(loss, "random", False):
            raise TaskError(
                f"{name_of(loss)} draws new noise at every visit, so it measures nothing twice: "
                "pass measure=, for example lambda model, batch: -loss(model, batch) with the "
                "fb.losses.Denoising that it was made from"
            )
        known = isinstance(recipe, Recipe)
        empty = cls(
            subsets=masks,
            outcomes=torch.empty(len(chosen), len(masks), len(queries)),
            seeds=chosen,
            kind="leave_one_out" if bool((~masks).sum(1).eq(1).all()) else "subsets",
            train=train.fingerprint,
            queries=queries.fingerprint,
            model="" if model is None else state_hash(model.state_dict()),
            measure=f"minus {name_of(loss)}" if measure is None else name_of(measure),
            measured={"minus": describe(loss)} if measure is None else describe(measure),
            recipe=recipe.settings if known else {"callable": describe(recipe)},
            recipe_hash=recipe.fingerprint if known else "",
            version=version("forebear"),
        )
        work = _Work(recipe, train, queries, _measurement(measure, loss), empty, full, PIECE)
        values = work.run(folder, executor)
        return work.result(values)

    @property
    def mean_outcomes(self) -> Tensor:
        """Outcomes averaged over seeds, `[m, q]`."""
        return self.outcomes.mean(0)

    @property
    def removal_effects(self) -> Tensor:
        """The measurement with the left-out examples minus that without them, `[q, m]`.

        Positive where the examples raised the measurement, as scores are; mean over seeds.

        Raises:
            DataError: there are no models trained on everything.
        """
        if self.full is None:
            raise DataError("no models trained on everything: collect the truth with full=True")
        return (self.full[:, None] - self.outcomes).mean(0).T

    @property
    def left_out(self) -> Tensor:
        """Position of the example that each subset lacks, `[m]`.

        Raises:
            DataError: subsets lack more than one.
        """
        if self.kind != "leave_one_out":
            raise DataError("these subsets lack more than one example each")
        return (~self.subsets).int().argmax(1)

    def require_match(self, scores: Scores) -> None:
        """Raise `MismatchError` when scores are of other data or of another model."""
        here = Provenance(
            method="ground truth", train=self.train, queries=self.queries, model=self.model
        )
        fields = ("train", "queries", "model") if self.model else ("train", "queries")
        here.require_same(scores.provenance, fields)

    def save(self, folder: str | Path) -> None:
        """Write `truth.safetensors` and `truth.json` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"subsets": self.subsets, "outcomes": self.outcomes}
        if self.full is not None:
            tensors["full"] = self.full
        write_tensors(folder / "truth.safetensors", tensors)
        write_json(folder / "truth.json", self._facts())

    @classmethod
    def load(cls, folder: str | Path) -> "GroundTruth":
        """Read what `save` wrote.

        Raises:
            FormatError: a file is missing or damaged.
        """
        facts = read_json(Path(folder) / "truth.json")
        tensors = read_tensors(Path(folder) / "truth.safetensors")
        read: dict[str, Any] = {k: v for k, v in facts.items() if k in cls.__dataclass_fields__}
        try:
            return cls(**{**read, **tensors, "seeds": tuple(facts["seeds"])})
        except (KeyError, TypeError) as error:
            raise FormatError(f"{folder} does not hold a whole ground truth: {error}") from error

    def _facts(self) -> dict[str, Any]:
        names = ("kind", "train", "queries", "model", "measure", "measured", "recipe")
        names = (*names, "recipe_hash", "version")
        return {"seeds": list(self.seeds), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class _Work:
    """All retrainings of a ground truth, in pieces."""

    trainer: Trainer
    train: Data
    queries: Data
    measure: Loss
    empty: GroundTruth
    full: bool
    size: int  # of a piece, here because workers know nothing of changes to this module

    def run(self, folder: str | Path | None, executor: Executor | None) -> Tensor:
        """Measurements `[members, q]`, members as `_members` orders them."""
        members = self._members()
        starts = range(0, len(members), self.size)
        names = [f"piece-{start:06d}" for start in starts]
        pieces = Pieces(folder, self._facts(), "retrainings")
        found = results(self.piece, names, "ground truth", pieces=pieces, executor=executor)
        values = []
        for name, start, result in zip(names, starts, found, strict=True):
            shape = (len(members[start : start + self.size]), len(self.queries))
            values.append(outcomes_of(result, shape, name, folder))
        return torch.cat(values)

    def piece(self, number: int) -> dict[str, Tensor]:
        """The measurements of one piece."""
        start = number * self.size
        return {"outcomes": self._measure(self._members()[start : start + self.size])}

    def result(self, values: Tensor) -> GroundTruth:
        """The ground truth with its outcomes."""
        seeds, m = len(self.empty.seeds), len(self.empty.subsets)
        outcomes = values[: seeds * m].reshape(seeds, m, -1)
        full = values[seeds * m :] if self.full else None
        return replace(self.empty, outcomes=outcomes, full=full)

    def _members(self) -> list[tuple[Tensor, int]]:
        masks = list(self.empty.subsets)
        everything = [torch.ones_like(masks[0])] if self.full else []
        seeds = self.empty.seeds
        return [(m, s) for s in seeds for m in masks] + [(m, s) for s in seeds for m in everything]

    def _measure(self, members: list[tuple[Tensor, int]]) -> Tensor:
        if isinstance(self.trainer, Recipe):
            masks = torch.stack([mask for mask, _ in members])
            models = self.trainer.train_many(self.train, masks, [seed for _, seed in members])
            outcomes = models.evaluate(self.measure, self.queries)
        else:
            measured = partial(evaluate_model, function=self.measure, data=self.queries)
            pairs = track(members, "retraining models", total=len(members))
            outcomes = torch.stack([measured(self.trainer(*pair)) for pair in pairs])
        bad = torch.nonzero(~torch.isfinite(outcomes))
        if len(bad):
            raise NonFiniteError(
                f"the measurement of query {self.queries.ids[int(bad[0, 1])]} is NaN or infinite "
                f"after retraining with seed {members[int(bad[0, 0])][1]}"
            )
        return outcomes.cpu()

    def _facts(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.empty.subsets.numpy().tobytes()).hexdigest()[:16]
        return {**self.empty._facts(), "subsets": digest, "full": self.full}


def outcomes_of(
    result: dict[str, Tensor], shape: tuple[int, ...], name: str, folder: str | Path | None
) -> Tensor:
    """The outcomes of a piece.

    Raises:
        FormatError: they are missing or of another shape.
    """
    outcomes = result.get("outcomes")
    if outcomes is None or tuple(outcomes.shape) != shape:
        raise FormatError(f"{name} in {folder} is damaged: delete it and it is made again")
    return outcomes


def _measurement(measure: Loss | None, loss: Loss | None) -> Loss:
    if measure is not None:
        return measure
    if loss is None:
        raise TaskError("a callable that trains has no loss: pass loss= or measure=")
    return partial(_minus, loss)


def _minus(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    return -loss(model, batch)
