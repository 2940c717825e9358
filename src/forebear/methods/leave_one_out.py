"""Retraining from scratch without each example."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from forebear.data import Data
from forebear.errors import TaskError
from forebear.executors import Executor, results
from forebear.methods.retrained import (
    FittedRetrained,
    require_adjustable,
    require_feasible,
    restored,
)
from forebear.stream import BATCH, is_elsewhere
from forebear.task import Task
from forebear.training.continuation import require_finite_losses
from forebear.training.recipe import Recipe, seeded
from forebear.training.response import Adjustment
from forebear.training.stacked import State, joined, state_of
from forebear.training.subsets import leave_one_out_subsets
from forebear.types import require_choices

MODELS = 50
"""Retrainings that go to another process together."""


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """The measurement of models retrained from scratch with an example minus without it.

    A saved configuration holds the recipe's settings, its functions by name: what was saved can be
    scored without it, and training again takes the recipe itself.

    Attributes:
        recipe: how the model was trained.
        adjustment: compare with a model trained on everything, `"full"`, or with the `"mean"` of
            all models.
        seeds: trainings of each, averaged.
        seed: the first of them.
        limit: most training examples, for each is a training of its own.
    """

    name: str = "leave_one_out"
    recipe: Recipe | None = None
    adjustment: Adjustment = "full"
    seeds: int = 1
    seed: int = 0
    limit: int = 2000

    def __post_init__(self) -> None:
        require_choices(self)
        if self.seeds < 1:
            raise TaskError(f"seeds is {self.seeds}: it must be at least 1")

    def fit(
        self,
        task: Task,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "FittedLeaveOneOut":
        """Retrain without each example, where `executor` says; all models are kept."""
        data = Data.of(train, ids=ids, collate=task.collate)
        require_feasible(task, data, self.seeds, self.limit)
        require_adjustable(self.adjustment, data)
        recipe = self._usable_recipe(task)
        with task.evaluation():
            require_finite_losses(task, task.model, data)
        everything = torch.ones(1, len(data), dtype=torch.bool)
        masks = torch.cat([everything, leave_one_out_subsets(len(data), range(len(data)))])
        seeds = [self.seed + k for k in range(self.seeds) for _ in range(len(masks))]
        fitted = FittedLeaveOneOut(self, task, data, batch_size=batch_size, executor=executor)
        masks = masks.repeat(self.seeds, 1)
        if is_elsewhere(executor):
            names = [f"models-{start:06d}" for start in range(0, len(masks), MODELS)]
            compute = partial(_trained, recipe, data, masks, seeds)
            found = results(compute, names, "leave-one-out", executor=executor)
            fitted.states = {k: v.to(task.device) for k, v in joined(list(found)).items()}
        else:
            fitted.states = recipe.train_many(data, masks, seeds).state
        return fitted

    def restore(self, task: Task, train: Data, tensors: dict[str, Tensor]) -> "FittedLeaveOneOut":
        """From the saved states; the recipe is not needed."""
        fitted = FittedLeaveOneOut(self, task, train, batch_size=BATCH)
        restored(fitted, tensors)
        return fitted

    def _usable_recipe(self, task: Task) -> Recipe:
        if self.recipe is None:
            raise TaskError("leave_one_out retrains the model and has no recipe: pass recipe=")
        if not callable(self.recipe.build) or not callable(self.recipe.loss):
            raise TaskError(
                "this recipe was read from a folder, which holds its functions by name only: "
                "pass the recipe itself"
            )
        with seeded(0):
            built = {name: v.shape for name, v in state_of(self.recipe.build()).items()}
        own = {name: v.shape for name, v in state_of(task.model).items()}
        if built != own:
            raise TaskError(
                f"the recipe builds a model with {sorted(built)} and the task's has {sorted(own)}, "
                "or of other shapes: both must be of one architecture"
            )
        return self.recipe


class FittedLeaveOneOut(FittedRetrained):
    """Models retrained without each example."""


def _trained(recipe: Recipe, data: Data, masks: Tensor, seeds: list[int], piece: int) -> State:
    """The states of `MODELS` models."""
    rows = slice(piece * MODELS, (piece + 1) * MODELS)
    return dict(recipe.train_many(data, masks[rows], seeds[rows]).state)
