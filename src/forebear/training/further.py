"""Further training with and without examples: the gold standard when only the final model is there.

After Wei et al., "Final-Model-Only Data Attribution with a Unifying View of Gradient-Based Methods"
(NeurIPS 2025).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from forebear.data import Data
from forebear.errors import DataError, NonFiniteError, NumericalWarning, TaskError, unknown_name
from forebear.executors import Executor, Pieces, results
from forebear.progress import track
from forebear.task import Loss, Task
from forebear.training.continuation import Continuation, steps_at
from forebear.training.recipe import OPTIMIZERS, name_of
from forebear.training.response import Adjustment, Response
from forebear.training.schemes import Removals, Scheme
from forebear.training.truth import outcomes_of
from forebear.types import require_choices


@dataclass(frozen=True, kw_only=True)
class FurtherTraining:
    """Train a final model on, with and without examples, and measure what changes.

    Every run starts from the given model with a fresh optimizer and a constant learning rate, and
    follows the mean loss of mini-batches. All runs of a seed see the same batches.

    Attributes:
        learning_rate: of the further training.
        optimizer: `"sgd"`, `"adam"` or `"adamw"`; its original state is not known, so it is fresh.
        momentum: of SGD.
        betas: of Adam and AdamW.
        epsilon: of Adam and AdamW.
        weight_decay: as the optimizer of that name understands it.
        clip: largest norm of a step's gradient; None for any.
        batch_size: the largest size of a batch.
        amounts: epochs after which queries are measured, rising; parts of an epoch are allowed.
        scheme: `"every"` takes the examples' share out of every step, `"mask"` takes them out of
            their own batches, `"shift"` out of the order of the examples.
        fraction: of the examples' weight that is removed; effects are divided by it.
        seeds: orders of the examples to average over, at least.
        max_seeds: most seeds that may be added until `reliability` is reached; None adds none.
        reliability: split-half reliability of the gold, mean over queries, to be reached at every
            amount.
        seed: the first seed.
        adjustment: what a run is compared with: `"full"`, a run on everything, or `"mean"`, the
            mean of all runs.
        double: train in double precision, for effects of single examples are tiny.
        dropout: `"off"`, or `"shared"`: active, with the same random numbers in all runs of a seed.
            Statistics of batch norms stay as they are in any case.
        short_last: cut epochs as torch's `DataLoader` does, full batches and a short last one,
            instead of into batches of even size.
    """

    learning_rate: float = 0.01
    optimizer: str = "sgd"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None
    batch_size: int = 64
    amounts: tuple[float, ...] = (1, 2, 5, 10, 20, 50)
    scheme: Scheme = "every"
    fraction: float = 1.0
    seeds: int = 2
    max_seeds: int | None = 10
    reliability: float = 0.9
    seed: int = 0
    adjustment: Adjustment = "full"
    double: bool = True
    dropout: Literal["off", "shared"] = "off"
    short_last: bool = False

    def __post_init__(self) -> None:
        require_choices(self)
        if self.optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("learning_rate", "fraction", "batch_size", "seeds"):
            if not getattr(self, name) > 0:
                raise TaskError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.fraction > 1:
            raise TaskError(f"fraction is {self.fraction}: at most all of the weight, 1, can go")
        if self.clip is not None and not self.clip > 0:
            raise TaskError(f"clip is {self.clip}: it must be above 0, or None")
        rising = list(self.amounts) == sorted(set(self.amounts))
        if not self.amounts or not rising or self.amounts[0] <= 0:
            raise TaskError(f"amounts are {self.amounts}: give rising numbers of epochs above 0")
        if self.max_seeds is not None and self.max_seeds < self.seeds:
            raise TaskError(f"max_seeds is {self.max_seeds} and seeds is {self.seeds}")
        if not 0 < self.reliability < 1:
            raise TaskError(f"reliability is {self.reliability}: it must be between 0 and 1")

    def measure(
        self,
        task: Task | nn.Module,
        train: Any,
        queries: Any,
        *,
        left_out: Any = None,
        ids: Any = None,
        loss: Loss | None = None,
        folder: str | Path | None = None,
        executor: Executor | None = None,
    ) -> Response:
        """Train on with and without examples, and measure every query.

        Args:
            task: the final model, its loss and measurement; or a model, with `loss`.
            train: training set, n examples.
            queries: what is measured, q of them.
            left_out: ids of examples, each left out alone, or a list of lists of ids, each left
                out together; all examples one by one when left out.
            ids: a stable id for each training example; positions when left out.
            loss: of a bare model.
            folder: where pieces of the work are kept; what is there is not done again.
            executor: where to train; in this process when left out.

        Raises:
            DataError: an id is unknown or stands twice, or too few examples are left out.
            MismatchError: the folder belongs to another model, data set or settings.
            NonFiniteError: a loss or measurement is NaN or infinite.
        """
        task = _task(task, loss)
        data = Data.of(train, ids=ids, collate=task.collate)
        asked = Data.of(queries, collate=task.collate)
        groups = groups_of(data, left_out)
        if self.adjustment == "mean" and len(groups) < 3:
            raise DataError(
                f"{len(groups)} runs are asked for with the mean adjustment: leave out at least "
                "3, or use adjustment='full'"
            )
        work = _Measurement(self, task, data, asked, groups, folder, executor)
        values: list[Tensor] = []
        while True:
            values.append(work.seed(self.seed + len(values)))
            if len(values) < self.seeds:
                continue
            response = work.response(torch.stack(values))
            if self.max_seeds is None or _reached(response, self.reliability):
                break
            if len(values) >= self.max_seeds:
                _warn_of_unreliable(response, self.reliability)
                break
        response.warn_of_rounding()
        return response

    def removals(self, n: int, groups: Sequence[Tensor]) -> Removals:
        """The runs over n examples, each without a group of positions."""
        return Removals(
            n,
            groups,
            scheme=self.scheme,
            batch_size=self.batch_size,
            fraction=self.fraction,
            short_last=self.short_last,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(FurtherTraining)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


class _Measurement:
    """One measurement: what its seeds share."""

    def __init__(
        self,
        settings: FurtherTraining,
        task: Task,
        train: Data,
        queries: Data,
        groups: list[Tensor],
        folder: str | Path | None,
        executor: Executor | None,
    ) -> None:
        self.executor = executor
        self.settings = settings
        self.train = train
        self.queries = queries
        self.groups = groups
        nothing = torch.empty(0, dtype=torch.long)
        self.removals = settings.removals(len(train), [nothing, *groups])
        self.continuation = Continuation(settings, task, train, self.removals)
        self._asked = self.continuation.cast(queries)
        self._task = task
        self.facts = {
            "model": task.model_hash(),
            "train": train.fingerprint,
            "queries": queries.fingerprint,
            "measure": "minus loss" if task.measure is None else name_of(task.measure),
            "version": version("forebear"),
        }
        own = {"reliability", "seeds", "max_seeds", "adjustment"}  # these change no run
        kept = {k: v for k, v in settings.settings.items() if k not in own}
        left = [group.tolist() for group in groups]
        known = {**self.facts, **task.facts(), **kept, "groups": left}
        self.pieces = Pieces(folder, known, "runs")

    def seed(self, seed: int) -> Tensor:
        """Measurements of all runs, `[amounts, q, 1 + m]`, training on everything first."""
        parts = self.continuation.parts()
        names = [f"seed-{seed:04d}-part-{part:05d}" for part in range(len(parts))]
        found = results(
            partial(self.part, seed),
            names,
            "further training",
            pieces=self.pieces,
            executor=self.executor,
        )
        values: Tensor | None = None
        for name, runs, result in zip(names, parts, found, strict=True):
            shape = (len(self.settings.amounts), len(self.queries), len(runs))
            outcomes = outcomes_of(result, shape, name, self.pieces.folder)
            if values is None:
                values = outcomes.new_empty(*shape[:2], len(self.removals))
            values[..., runs] = outcomes
        assert values is not None
        return values

    def part(self, seed: int, part: int) -> dict[str, Tensor]:
        """Measurements of the runs of one part."""
        runs, amounts = self.continuation.parts()[part], self.settings.amounts
        followed = self.continuation.follow(runs, seed, amounts)
        models = track(followed, "amounts of further training", total=len(amounts))
        return {"outcomes": torch.stack([self._measured(one, seed) for one in models])}

    def response(self, values: Tensor) -> Response:
        """The response from `[seeds, amounts, q, 1 + m]`."""
        settings = self.settings
        per_epoch = self.removals.steps(0)
        single = all(len(group) == 1 for group in self.groups)
        names = [f"group {i}" for i in range(len(self.groups))]
        rows = [int(group[0]) for group in self.groups]
        return Response(
            outcomes=values[..., 1:],
            full=values[..., 0],
            amounts=tuple(settings.amounts),
            steps=tuple(steps_at(amount, per_epoch) for amount in settings.amounts),
            learning_rate=settings.learning_rate,
            groups=tuple(tuple(group.tolist()) for group in self.groups),
            fraction=settings.fraction,
            adjustment=settings.adjustment,
            seeds=tuple(settings.seed + k for k in range(len(values))),
            train_ids=self.train.ids[rows] if single else np.asarray(names),
            query_ids=self.queries.ids,
            settings={**settings.settings, "excluded": self.continuation.excluded},
            **self.facts,
        )

    def _measured(self, models: Any, seed: int) -> Tensor:
        """Measurements `[q, runs]`."""
        values = self.continuation.evaluate(models, self._task.measurements, self._asked).cpu()
        bad = torch.nonzero(~torch.isfinite(values))
        if len(bad):
            raise NonFiniteError(
                f"the measurement of query {self.queries.ids[int(bad[0, 1])]} is NaN or infinite "
                f"after further training with seed {seed}"
            )
        return values.T


def groups_of(data: Data, left_out: Any) -> list[Tensor]:
    """Positions of the groups that ids describe; every example alone for None.

    Raises:
        DataError: there is no group, one is empty, or an id is unknown or stands twice.
    """
    if left_out is None:
        return list(torch.arange(len(data))[:, None])
    given = left_out.tolist() if isinstance(left_out, Tensor | np.ndarray) else list(left_out)
    if not given:
        raise DataError("left_out is empty: name at least one example, or leave it out for all")
    known = {value: place for place, value in enumerate(data.ids.tolist())}
    lists = [list(g) if isinstance(g, list | tuple | Tensor | np.ndarray) else [g] for g in given]
    groups = [_positions(group, known) for group in lists]
    seen: set[tuple[int, ...]] = set()
    for group in groups:
        key = tuple(sorted(group.tolist()))
        if key in seen:
            raise DataError(f"left_out holds {data.ids[list(key)].tolist()} more than once")
        if len(key) == len(data):
            raise DataError("left_out holds a group of all examples: nothing is left to train on")
        seen.add(key)
    return groups


def _positions(group: list[Any], known: dict[Any, int]) -> Tensor:
    values = [v.item() if isinstance(v, Tensor | np.generic) else v for v in group]
    if not values:
        raise DataError("left_out holds an empty group")
    for value in values:
        if value not in known:
            raise DataError(f"left_out holds {value!r}, which is no id of the training set")
    if len(set(values)) < len(values):
        raise DataError(f"left_out holds a group with an id more than once: {values}")
    return torch.tensor([known[value] for value in values])


def _task(task: Task | nn.Module, loss: Loss | None) -> Task:
    if isinstance(task, Task):
        return task
    if loss is None:
        raise TaskError("a bare model has no loss: pass a Task, or loss=")
    return Task(task, loss)


def _reached(response: Response, target: float) -> bool:
    known = response.reliability[~np.isnan(response.reliability)]
    return len(response.seeds) > 1 and bool((known >= target).all())


def _warn_of_unreliable(response: Response, target: float) -> None:
    lowest = float(np.nanmin(response.reliability))
    warnings.warn(
        f"the gold standard has a split-half reliability of {lowest:.2f} with "
        f"{len(response.seeds)} seeds and {target} was asked for: raise max_seeds, or use "
        "scheme='every'",
        NumericalWarning,
        stacklevel=3,
    )
