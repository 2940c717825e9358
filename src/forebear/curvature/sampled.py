"""Losses at targets drawn from the model, whose gradients have the Fisher matrix as moments."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from forebear.data import require_finite
from forebear.task import Task


class Drawn(NamedTuple):
    """A batch with targets that were drawn for it, and their weights."""

    batch: Any
    targets: Tensor
    weights: Tensor


class Sampled:
    """A function to differentiate: the loss at targets drawn anew for every batch."""

    def __init__(self, task: Task, seed: int) -> None:
        self.objective = task.objective
        self.generator = torch.Generator(task.device).manual_seed(seed)

    def prepare(self, model: nn.Module, batch: Any) -> Drawn:
        """Draw targets, for a batch that will be differentiated more than once."""
        with torch.no_grad():
            outputs = self.objective.outputs(model, batch)
            require_finite(outputs, "model's output")
            return Drawn(batch, *self.objective.sample(outputs, batch, self.generator))

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of each example at drawn targets, `[b]`."""
        if isinstance(batch, Drawn):
            outputs = self.objective.outputs(model, batch.batch)
            return self.objective.loss_at(outputs, batch.batch, batch.targets, batch.weights)
        return self.objective.sampled(model, batch, self.generator)
