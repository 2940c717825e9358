"""What is differentiated on training examples and on queries, and projected gradients of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forebear.data import batch_length
from forebear.projections import ProjectedStream
from forebear.stream import Result, Stream
from forebear.task import Task, per_example

READY = ("loss", "output")
"""Gradients that every task has; others are functions that the task's objective knows by name."""


class TrainingFunction:
    """What is differentiated on training examples; remembers the last batch's weights."""

    def __init__(self, task: Task, gradient: str) -> None:
        self.task = task
        self.gradient = gradient
        self.weights = torch.ones(())

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """The loss `[b]`, a named function, or TRAK's output, whose weight `−dℓ/df` is kept."""
        if self.gradient != "output":
            return self.forgetful(model, batch)
        output, self.weights = self.task.objective.link(model, batch)
        return output

    def forgetful(self, model: Any, batch: Any) -> Tensor:
        """The same values, and the weights stay those of the batch before."""
        if self.gradient == "loss":
            return self.task.losses(model, batch)
        if self.gradient == "output":
            return self.task.objective.link(model, batch)[0]
        function = self.task.objective.function(self.gradient)
        return per_example(function(model, batch), batch_length(batch), self.gradient)

    @property
    def parts(self) -> tuple[Callable[[Any, Any], Tensor], ...]:
        """Functions whose mean this is, one for each level of noise and draw."""
        return parts_of(self.task, self.gradient)


@dataclass(frozen=True)
class QueryFunction:
    """What is differentiated on queries, `[b]`, signed so that proponents score positive.

    Attributes:
        task: what is asked.
        gradient: of training examples.
    """

    task: Task
    gradient: str

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """`[b]`."""
        task = self.task
        if self.gradient == "loss":
            return -task.measurements(model, batch)
        if self.gradient == "output":
            # ∇ℓ = −weight · ∇f, so products with ∇f already have the right sign.
            if task.measure is None:
                return task.objective.link(model, batch)[0]
            return task.measurements(model, batch)
        # Another function than the loss stands in for it on both sides.
        if task.measure is None:
            return TrainingFunction(task, self.gradient)(model, batch)
        return -task.measurements(model, batch)

    @property
    def parts(self) -> tuple[Callable[[Any, Any], Tensor], ...]:
        """Functions whose mean this is; a measurement of the task's own is one."""
        return parts_of(self.task, self.gradient) if self.task.measure is None else (self,)


def parts_of(task: Task, gradient: str) -> tuple[Callable[[Any, Any], Tensor], ...]:
    """Functions of single points whose mean is differentiated.

    Raises:
        TaskError: the task's loss is a plain callable.
    """
    if gradient == "loss":
        return task.objective.parts
    if gradient == "output":
        return tuple(lambda m, b, part=part: part.link(m, b)[0] for part in task.objective.parts)
    return task.objective.function(gradient).parts


def features_of(gradient: str, stream: Stream | ProjectedStream, piece: int) -> Result:
    """Projected gradients `[b, k]` of a piece, and the weights `[b]` of its examples."""
    function, parts, weights = TrainingFunction(stream.task, gradient), [], []
    for _, values, gradients in stream.gradients(function, "projected gradients"):
        parts.append(torch.cat([terms[0].left[:, 0] for terms in gradients.values()], 1))
        weights.append(function.weights.to(parts[-1]).expand(len(values)))
    return {"features": torch.cat(parts), "weights": torch.cat(weights)}
