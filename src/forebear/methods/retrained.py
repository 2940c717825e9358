"""Scores from models that were really trained without each example, all of them kept."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from forebear.data import Data
from forebear.errors import DataError, FormatError, TaskError
from forebear.methods.fitted import Fitted, Piece
from forebear.task import Task
from forebear.training.continuation import doubled
from forebear.training.ensemble import Ensemble
from forebear.training.stacked import WORKSPACE, State, rows_of, state_of


class FittedRetrained(Fitted):
    """The models without each example, stacked.

    Attributes:
        states: parameters and buffers by name, `[seeds (n + 1), *shape]`: for each seed the model
            trained on everything, then those without example 0 to n − 1.
    """

    units = "removal"
    states: State

    @property
    def coverage(self) -> float:
        """All parameters: they are trained as the recipe says."""
        return 1.0

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """The measurement with each example minus that without it, mean over seeds."""
        asked = self._cast(queries)
        with self.task.evaluation():
            values = torch.stack(
                [
                    models.evaluate(self.task.measurements, asked, batch_size=self.batch_size)
                    for models in self._seeds()
                ]
            )  # [seeds, 1 + n, q]
        effects = (self._base(values) - values[:, 1:]).mean(0).T
        yield slice(0, len(queries)), slice(0, len(self.train)), effects

    def self_influence(self) -> Tensor:
        """Each example's measurement with it minus that without it, mean over seeds."""
        own = self._cast(self.train)
        effects = []
        with self.task.evaluation():
            for models in self._seeds():
                full, others = _split(models)
                compared = full if self.method.adjustment == "full" else others
                base = compared.evaluate(self.task.measurements, own, batch_size=self.batch_size)
                effects.append(base.mean(0) - others.evaluate_own(self.task.measurements, own))
        return torch.stack(effects).mean(0)

    def tensors(self) -> dict[str, Tensor]:
        """The states of all models."""
        return {f"states.{name}": value for name, value in self.states.items()}

    def _base(self, values: Tensor) -> Tensor:
        if self.method.adjustment == "mean":
            return values[:, 1:].mean(1, keepdim=True)
        return values[:, :1]

    def _seeds(self) -> Iterator[Ensemble]:
        """The models of each seed."""
        template = copy.deepcopy(self.task.model)
        if self._is_double:
            template.double()
        runs = len(self.train) + 1
        for start in range(0, len(next(iter(self.states.values()))), runs):
            yield Ensemble(template.eval(), rows_of(self.states, start, runs))

    @property
    def _is_double(self) -> bool:
        return any(value.dtype == torch.float64 for value in self.states.values())

    def _cast(self, data: Data) -> Data:
        return doubled(data) if self._is_double else data


def restored(fitted: FittedRetrained, tensors: dict[str, Tensor]) -> FittedRetrained:
    """`fitted` with the states that were saved.

    Raises:
        FormatError: they do not belong to the task's model and training set.
    """
    device = fitted.task.device
    states = {k.removeprefix("states."): value.to(device) for k, value in tensors.items()}
    names = set(state_of(fitted.task.model))
    count = len(next(iter(states.values()), ()))
    if set(states) != names or not count or count % (len(fitted.train) + 1):
        raise FormatError("the saved states do not fit the task's model: fit the method again")
    fitted.states = states
    return fitted


def require_feasible(task: Task, data: Data, seeds: int, limit: int) -> None:
    """Refuse to train more models than was allowed, or more than can be kept.

    Raises:
        DataError: there are more than `limit` examples.
        TaskError: the states of all models would be too large.
    """
    n = len(data)
    if n > limit:
        raise DataError(
            f"{n} examples mean {seeds * n} trainings and limit is {limit} examples: raise limit, "
            "or measure some examples with fb.FurtherTraining(...).measure(left_out=...)"
        )
    size = sum(value.numel() for value in state_of(task.model).values())
    if seeds * (n + 1) * size > WORKSPACE:
        raise TaskError(
            f"{seeds * (n + 1)} models of {size} parameters are too large to keep: measure some "
            "examples with fb.FurtherTraining(...).measure(left_out=...)"
        )


def require_adjustable(adjustment: str, data: Data) -> None:
    """Refuse the mean adjustment where the mean says too little.

    Raises:
        DataError: fewer than three examples.
    """
    if adjustment == "mean" and len(data) < 3:
        raise DataError(f"{len(data)} examples are too few for the mean adjustment: use 'full'")


def _split(models: Ensemble) -> tuple[Ensemble, Ensemble]:
    """The model trained on everything, and the others."""
    others: Any = rows_of(models.state, 1, len(models) - 1)
    return (
        Ensemble(models.template, rows_of(models.state, 0, 1)),
        Ensemble(models.template, others),
    )
