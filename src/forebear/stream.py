"""Streams of gradients: a dataset in order, batch by batch, in memory bounded by the batch."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Capture, Function, Gradients
from forebear.data import Batch, Data, naming
from forebear.progress import track
from forebear.task import Task

BATCH = 512


@dataclass(frozen=True)
class Stream:
    """A task's gradients over a dataset.

    Attributes:
        task: model and functions.
        plan: blocks to capture.
        data: what to run over.
        batch_size: examples at a time; changes no result beyond rounding.
    """

    task: Task
    plan: Plan
    data: Data
    batch_size: int = BATCH

    def gradients(
        self, function: Function, description: str
    ) -> Iterator[tuple[slice, Tensor, Gradients]]:
        """Positions, values `[b]` and factored gradients of `function`, batch by batch.

        Raises:
            NonFiniteError: with the ids of the examples.
        """
        with Capture(self.task, self.plan) as capture:
            for rows, batch in self.batches(description):
                with naming(self.data, rows):
                    values, gradients = capture.gradients(function, batch)
                yield rows, values, gradients

    def at(self, rows: slice, function: Function) -> tuple[Tensor, Gradients]:
        """Values and gradients of one batch."""
        with Capture(self.task, self.plan) as capture, naming(self.data, rows):
            return capture.gradients(function, self.data.batch(rows))

    def batches(self, description: str) -> Iterator[tuple[slice, Batch]]:
        """Positions and batches, with a progress bar."""
        steps = -(-len(self.data) // self.batch_size)
        return track(self.data.batches(self.batch_size), description, total=steps)
