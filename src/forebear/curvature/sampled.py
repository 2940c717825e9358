"""Losses at targets drawn from the model, whose gradients have the Fisher matrix as moments."""

from typing import Any, NamedTuple

import numpy as np
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
    """A function to differentiate: the loss at targets drawn anew for every batch of a piece."""

    def __init__(self, task: Task, seed: int, piece: int = 0) -> None:
        self.objective = task.objective
        self.generator = generator_of(task, seed, piece)

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


def generator_of(task: Task, seed: int, piece: int) -> torch.Generator:
    """What draws the targets of a piece of the data, wherever and whenever it is worked out."""
    own = seed
    if piece:
        own = int(np.random.SeedSequence([seed % 2**64, piece]).generate_state(1, np.uint64)[0])
    return torch.Generator(task.device).manual_seed(own)
