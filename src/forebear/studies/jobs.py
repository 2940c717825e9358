"""Pieces of a study: made anywhere, kept, and timed also when the study went on later."""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from forebear.errors import ForebearError, ForebearWarning
from forebear.executors import Executor, InProcess
from forebear.studies.base import Pieces
from forebear.types import read_json, write_json

TRAINING, TRUTH, SCORING, REMOVAL = "training", "ground truth", "scoring", "removal"

PARTS = (TRAINING, TRUTH, SCORING, REMOVAL)

Found = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors, and what else is known of them, ready for JSON."""


@dataclass(frozen=True)
class Job:
    """How a piece is made.

    Attributes:
        part: of the study.
        name: of the piece.
        make: gives its tensors and what else is known; other processes get it by pickle.
    """

    part: str
    name: str
    make: Callable[[], Found]


def heard(make: Callable[[], Found]) -> Found:
    """What a method gives, with its `"warnings"`, or why it `"refused"`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ForebearWarning)
        try:
            tensors, about = make()
        except ForebearError as error:
            return {}, {"refused": str(error)}
    texts = {str(w.message) for w in caught if issubclass(w.category, ForebearWarning)}
    return tensors, {**about, "warnings": sorted(texts)}


def refusal(found: Iterable[Found]) -> str | None:
    """Why the first that was refused was, None where none was."""
    return next((about["refused"] for _, about in found if "refused" in about), None)


@dataclass(frozen=True)
class TimedPieces(Pieces):
    """Pieces that an executor makes, and that remember what time of the processor they took.

    What a stopped run had not finished is not counted: sums are what the work takes from nothing.

    Attributes:
        executor: where pieces are made that do not wait for each other.
        used: part of the study and seconds, by name of every piece that was asked for.
        made: seconds of those that were made by this process.
    """

    executor: Executor = field(default_factory=InProcess)
    used: dict[str, tuple[str, float]] = field(default_factory=dict)
    made: dict[str, float] = field(default_factory=dict)

    def make(self, jobs: Iterable[Job], description: str) -> None:
        """Make what is not there, by the executor; a long piece is best asked for early.

        Args:
            jobs: pieces that do not need each other.
            description: for progress bars.
        """
        self.executor.run(_Jobs(self, tuple(jobs), description))

    def read(self, job: Job) -> Found:
        """A piece and what is known of it, `"seconds"` among them; made here when not there."""
        path = self.folder / f"{job.name}.json"

        def measured() -> dict[str, Tensor]:
            start = time.process_time()
            tensors, about = job.make()
            self.made[job.name] = time.process_time() - start
            # Before the piece itself: a piece that is there always has its time.
            write_json(path, {**about, "part": job.part, "seconds": self.made[job.name]})
            return tensors

        tensors = self.tensors(job.name, measured)
        known = read_json(path)
        self.used[job.name] = (job.part, known["seconds"])
        return tensors, known

    def seconds(self, part: str) -> float:
        """Of the processor, for all pieces of a part that were asked for."""
        return sum(seconds for other, seconds in self.used.values() if other == part)


@dataclass(frozen=True)
class _Jobs:
    """Pieces as the work of an executor."""

    pieces: TimedPieces
    jobs: tuple[Job, ...]
    description: str

    def __len__(self) -> int:
        return len(self.jobs)

    def done(self, piece: int) -> bool:
        """Whether the piece is there."""
        return self.pieces.has(self.jobs[piece].name)

    def do(self, piece: int) -> None:
        """Make it; its file is written last."""
        self.pieces.read(self.jobs[piece])
