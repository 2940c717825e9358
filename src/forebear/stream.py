"""Streams of gradients: a dataset in order, batch by batch, in memory bounded by the batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Capture, Gradients
from forebear.data import Batch, Data, naming
from forebear.differentiation import Function
from forebear.executors import Executor, InProcess, results
from forebear.progress import track
from forebear.task import Task

BATCH = 512
"""Examples at a time by default, and fewer where so many would not fit into `WORKING_BYTES`."""

WORKING_BYTES = 2**28
"""What the examples of a batch may take where the batch size is left to forebear (256 MB)."""

PIECE = 8192
"""Examples that sums are formed over before they are added up, wherever that is done."""

TOGETHER = 32
"""Pieces whose results lie on the disk at a time, on their way from other processes."""

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Stream:
    """A task's gradients over a dataset.

    Attributes:
        task: model and functions.
        plan: blocks to capture.
        data: what to run over.
        batch_size: examples at a time; changes no result beyond rounding.
        executor: where single passes over the data are made; in this process when None.
        writes: whether gradients are written out where that takes less memory than their factors.
    """

    task: Task
    plan: Plan
    data: Data
    batch_size: int = BATCH
    executor: Executor | None = None
    writes: bool = False

    @property
    def step(self) -> int:
        """Examples at a time, chosen where the batch size is the default."""
        return fitting(self.held, self.batch_size)

    @property
    def held(self) -> int:
        """Bytes that an example takes while its batch is worked on."""
        held = self.plan.held
        return 2 * held.pass_ + 2 * (held.written if self.writes else held.factors)

    def gradients(
        self, function: Function, description: str
    ) -> Iterator[tuple[slice, Tensor, Gradients]]:
        """Positions, values `[b]` and factored gradients of `function`, batch by batch.

        Raises:
            NonFiniteError: with the ids of the examples.
        """
        with Capture(self.task, self.plan, writes=self.writes) as capture:
            for rows, batch in self.batches(description):
                with naming(self.data, rows):
                    found = self.taken(capture, function, batch)
                yield rows, *found

    def at(self, rows: slice, function: Function) -> tuple[Tensor, Gradients]:
        """Values and gradients of one batch."""
        capturing = Capture(self.task, self.plan, writes=self.writes)
        with capturing as capture, naming(self.data, rows):
            return self.taken(capture, function, self.data.batch(rows))

    def taken(self, capture: Capture, function: Function, batch: Batch) -> tuple[Tensor, Gradients]:
        """Values `[b]` and gradients of a batch; streams of other gradients say here how."""
        return capture.gradients(function, batch)

    def batches(self, description: str) -> Iterator[tuple[slice, Batch]]:
        """Positions and batches, with a progress bar."""
        steps = -(-len(self.data) // self.step)
        return track(self.data.batches(self.step), description, total=steps)

    def part(self, rows: slice) -> "Stream":
        """The stream of some examples, here."""
        return replace(self, data=self.data.slice(rows), executor=None)


def fitting(held: int, batch_size: int) -> int:
    """Examples at a time that hold so many bytes each; other numbers than the default stay.

    Shapes alone decide, not what memory is free, so that results can be repeated anywhere.
    """
    if batch_size != BATCH or not held:
        return batch_size
    return max(1, min(BATCH, WORKING_BYTES // held))


def is_elsewhere(executor: Executor | None) -> bool:
    """Whether work is done in other processes."""
    return executor is not None and not isinstance(executor, InProcess)


def goes_elsewhere(stream: Any) -> bool:
    """Whether passes over a stream are made in other processes."""
    return is_elsewhere(getattr(stream, "executor", None))


def stretches(size: int) -> list[slice]:
    """Positions of the pieces of `size` examples: always the same, whoever works them out."""
    return [slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]


def piecewise(
    stream: Any, compute: Callable[[Any, int], Result], description: str
) -> Iterator[tuple[slice, Result]]:
    """Positions and result of every piece of a stream, in order.

    Args:
        stream: one with parts goes where its executor says; any other is one piece, done here.
        compute: from the stream over one piece, and its number, to its result. Other processes get
            it by pickle.
        description: for progress bars.
    """
    size = len(stream.data)
    if not hasattr(stream, "part"):
        yield slice(0, size), compute(stream, 0)
        return
    rows, executor = stretches(size), stream.executor
    each = _Pieces(stream.part(slice(0, size)), compute, rows)
    if not goes_elsewhere(stream):
        for number in track(range(len(rows)), description) if len(rows) > 1 else (0,):
            yield rows[number], each(number)
        return
    for start in range(0, len(rows), TOGETHER):
        some = replace(each, rows=rows[start : start + TOGETHER], first=start)
        names = [f"piece-{start + number:06d}" for number in range(len(some.rows))]
        found = results(some, names, description, executor=executor)
        for where, result in zip(some.rows, found, strict=True):
            # Copies: the files that they were read from will be gone.
            device = stream.task.device
            yield where, {name: value.to(device, copy=True) for name, value in result.items()}


def summed(stream: Any, compute: Callable[[Any, int], Result], description: str) -> Result:
    """Sums over a stream: those of its pieces, added up in order.

    The order of additions depends neither on where pieces are worked out nor on how many workers
    there are, so neither does the result. Arguments are those of `piecewise`.
    """
    total: Result = {}
    for _, found in piecewise(stream, compute, description):
        for name, value in found.items():
            total[name] = total[name].add_(value) if name in total else value
    return total


@dataclass(frozen=True)
class _Pieces:
    """The results of pieces by number, which goes to other processes."""

    stream: Any
    compute: Callable[[Any, int], Result]
    rows: list[slice]
    first: int = 0

    def __call__(self, number: int) -> Result:
        return self.compute(self.stream.part(self.rows[number]), self.first + number)
