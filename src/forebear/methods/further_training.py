"""Further training without each example, as an attribution method."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from forebear.data import Data
from forebear.executors import Executor, results
from forebear.methods.fitted import Piece
from forebear.methods.retrained import (
    FittedRetrained,
    require_adjustable,
    require_feasible,
    restored,
)
from forebear.stream import BATCH
from forebear.task import Task
from forebear.training.continuation import Continuation
from forebear.training.further import FurtherTraining
from forebear.training.response import Adjustment
from forebear.training.schemes import Scheme
from forebear.training.stacked import State, joined


@dataclass(frozen=True, kw_only=True)
class FurtherTrained:
    """How the model responds when it is trained on without an example (Wei et al. 2025).

    The model is trained on with everything and without each example in turn, from the same weights
    and with the same batches. The score is the measurement with the example minus without it.
    `FurtherTraining.measure` does the same for chosen examples, several amounts and groups.

    Attributes:
        learning_rate: of the further training.
        epochs: how long.
        batch_size: the largest size of a training batch.
        optimizer: `"sgd"`, `"adam"` or `"adamw"`, with a fresh state.
        momentum: of SGD.
        weight_decay: as the optimizer of that name understands it.
        clip: largest norm of a step's gradient; None for any.
        scheme: how an example is removed: `"every"`, `"mask"` or `"shift"`.
        fraction: of the example's weight that is removed; effects are divided by it.
        adjustment: compare with a run on everything, `"full"`, or with the `"mean"` over examples.
        seeds: orders of the examples to average over.
        seed: the first of them.
        double: train in double precision.
        dropout: `"off"`, or `"shared"` by all runs of a seed.
        limit: most training examples, for each is a training of its own.
    """

    name: str = "further_training"
    learning_rate: float = 0.01
    epochs: float = 5
    batch_size: int = 64
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    scheme: Scheme = "every"
    fraction: float = 1.0
    adjustment: Adjustment = "full"
    seeds: int = 2
    seed: int = 0
    double: bool = True
    dropout: Literal["off", "shared"] = "off"
    limit: int = 2000

    def __post_init__(self) -> None:
        _ = self.training

    @property
    def training(self) -> FurtherTraining:
        """The further training that this does."""
        return FurtherTraining(
            learning_rate=self.learning_rate,
            amounts=(self.epochs,),
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            clip=self.clip,
            scheme=self.scheme,
            fraction=self.fraction,
            adjustment=self.adjustment,
            seeds=self.seeds,
            max_seeds=None,
            seed=self.seed,
            double=self.double,
            dropout=self.dropout,
        )

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "FittedFurtherTrained":
        """Train one model without each example, where `executor` says; all of them are kept."""
        data = Data.of(train, ids=ids, collate=task.collate)
        require_feasible(task, data, self.seeds, self.limit)
        require_adjustable(self.adjustment, data)
        fitted = FittedFurtherTrained(self, task, data, batch_size=batch_size, executor=executor)
        fitted.states = self._trained(task, data, executor)
        return fitted

    def restore(
        self, task: Task, train: Data, tensors: dict[str, Tensor]
    ) -> "FittedFurtherTrained":
        """From the saved states."""
        fitted = FittedFurtherTrained(self, task, train, batch_size=BATCH)
        restored(fitted, tensors)
        return fitted

    def _trained(self, task: Task, data: Data, executor: Executor | None) -> State:
        nothing = torch.empty(0, dtype=torch.long)
        groups = [nothing, *torch.arange(len(data))[:, None]]
        removals = self.training.removals(len(data), groups)
        runs = Continuation(self.training, task, data, removals)
        each = range(self.seed, self.seed + self.seeds)
        work = [(seed, part) for seed in each for part in runs.parts()]
        names = [f"seed-{seed:04d}-run-{part[0]:06d}" for seed, part in work]
        compute = partial(_followed, runs, self.epochs, work)
        states = list(results(compute, names, "further training", executor=executor))
        places = [(seed - self.seed) * len(groups) + run for seed, part in work for run in part]
        order = torch.tensor(places).argsort()
        return {name: value[order].to(task.device) for name, value in joined(states).items()}


class FittedFurtherTrained(FittedRetrained):
    """Models trained on without each example."""

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """Effects in units of the whole example's removal."""
        for rows, columns, values in super().pieces(queries):
            yield rows, columns, values / self.method.fraction

    def self_influence(self) -> Tensor:
        """In the same units."""
        return super().self_influence() / self.method.fraction


def _followed(
    runs: Continuation, epochs: float, work: list[tuple[int, list[int]]], piece: int
) -> State:
    """The states of runs that are trained together, after so many epochs."""
    seed, part = work[piece]
    *_, models = runs.follow(part, seed, (epochs,))
    return {name: value.clone() for name, value in models.state.items()}
