"""One protocol for all places that work can run at: numbered pieces, each with a marker."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from forebear.errors import ForebearError
from forebear.progress import track


class Work(Protocol):
    """Work in numbered pieces that know nothing of each other.

    A piece leaves a marker when it is done: a file that is whole or absent, mostly its result. What
    is marked is never done again, so whatever was killed goes on where it stopped. Work goes to
    other processes by pickle, and results come back through the folder that holds the markers.
    """

    @property
    def description(self) -> str:
        """What progress bars and messages call it."""
        ...

    def __len__(self) -> int:
        """How many pieces there are, from 0."""
        ...

    def done(self, piece: int) -> bool:
        """Whether the marker of a piece is there."""
        ...

    def do(self, piece: int) -> None:
        """Do a piece and leave its marker last. Twice at once does no harm."""
        ...


class Executor(Protocol):
    """A place to run work at: a frozen configuration."""

    @property
    def leads(self) -> bool:
        """Whether this process writes what there is only once. Others of its group only wait."""
        ...

    def run(self, work: Work) -> None:
        """Do every piece that is not done, in any order.

        Raises:
            ForebearError: a piece was lost with its worker more often than is tried again.
            Exception: what a piece raised, as it raised it; the others may or may not be done.
        """
        ...

    def scratch(self) -> AbstractContextManager[Path]:
        """A folder that all workers see, gone at the end of the block."""
        ...


@dataclass(frozen=True)
class InProcess:
    """One piece after the other, here."""

    leads = True

    def run(self, work: Work) -> None:
        """Do every piece that is not done, in order."""
        for piece in track(missing(work), work.description):
            work.do(piece)

    def scratch(self) -> AbstractContextManager[Path]:
        """A temporary folder."""
        return temporary_folder()


def missing(work: Work) -> list[int]:
    """Numbers of the pieces that are not done."""
    return [piece for piece in range(len(work)) if not work.done(piece)]


def require_positive(executor: Any, *names: str) -> None:
    """Raise `ForebearError` unless these settings are at least 1."""
    for name in names:
        value = getattr(executor, name)
        if value < 1:
            raise ForebearError(f"{name} is {value}: it must be at least 1")


@contextmanager
def temporary_folder(inside: str | Path | None = None) -> Iterator[Path]:
    """A folder that is gone at the end of the block, among this machine's own when not told."""
    with tempfile.TemporaryDirectory(prefix="forebear-", dir=inside) as folder:
        yield Path(folder)
