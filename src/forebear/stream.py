"""Streams of gradients: a dataset in order, batch by batch, in memory bounded by the batch."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Capture, Function, Gradients
from forebear.data import Batch, Data
from forebear.errors import NonFiniteError
from forebear.progress import track
from forebear.task import Task

BATCH = 256


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
                try:
                    values, gradients = capture.gradients(function, batch)
                except NonFiniteError as error:
                    raise named(error, self.data, rows) from None
                yield rows, values, gradients

    def at(self, rows: slice, function: Function) -> tuple[Tensor, Gradients]:
        """Values and gradients of one batch."""
        with Capture(self.task, self.plan) as capture:
            try:
                return capture.gradients(function, self.data.batch(rows))
            except NonFiniteError as error:
                raise named(error, self.data, rows) from None

    def batches(self, description: str) -> Iterator[tuple[slice, Batch]]:
        """Positions and batches, with a progress bar."""
        steps = -(-len(self.data) // self.batch_size)
        return track(self.data.batches(self.batch_size), description, total=steps)


def named(error: NonFiniteError, data: Data, rows: slice) -> NonFiniteError:
    """The error with ids instead of positions in a batch."""
    positions = getattr(error, "rows", None)
    if positions is None:
        return error
    ids = data.ids[rows][positions.cpu().numpy()]
    shown = ", ".join(map(str, ids[:5])) + (" …" if len(ids) > 5 else "")
    return NonFiniteError(
        f"{error} (ids {shown}): remove or repair them, or raise the precision of the model"
    )
