"""Long work in a folder of pieces: what is there is not done again."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from forebear.descriptions import same, shown
from forebear.errors import FormatError, MismatchError
from forebear.executors.base import Executor, InProcess
from forebear.progress import track
from forebear.types import partial_path, read_json, read_tensors, write_json

Result = dict[str, Tensor]


class Pieces:
    """A folder that belongs to one piece of work, described by facts.

    Args:
        folder: made when missing; None keeps nothing.
        facts: what the work is, ready for JSON.
        noun: what messages call its results.

    Raises:
        MismatchError: the folder belongs to other work; the message names the fact that differs.
    """

    def __init__(
        self, folder: str | Path | None, facts: dict[str, Any] | None = None, noun: str = "work"
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        own: dict[str, Any] = json.loads(
            json.dumps(facts or {})
        )  # as they will be read: lists, not tuples
        path = self.folder / "work.json"
        if not path.exists():
            write_json(path, own)
            return
        stored = read_json(path)
        for name, value in own.items():
            if name not in stored:
                raise MismatchError(
                    f"{name} differs: {self.folder} holds {noun} of a version that did not record "
                    "it; choose another folder or delete that one"
                )
            theirs = stored[name]
            if not same(theirs, value):
                raise MismatchError(
                    f"{name} differs: {self.folder} holds {noun} with {shown(theirs, value)} and "
                    f"this is {shown(value, theirs)}; choose another folder or delete that one"
                )

    def has(self, name: str) -> bool:
        """Whether a piece was done."""
        return self.folder is not None and self._path(name).is_file()

    def read(self, name: str) -> Result | None:
        """The result of a piece, None where it was not done.

        Raises:
            FormatError: the file is damaged.
        """
        if not self.has(name):
            return None
        path = self._path(name)
        try:
            return read_tensors(path)
        except FormatError as error:
            raise FormatError(f"{path} is damaged: delete it and it is made again") from error

    def write(self, name: str, result: Result) -> None:
        """Keep the result of a piece."""
        if self.folder is not None:
            write_tensors(self._path(name), result)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"


def results(
    compute: Callable[[int], Result],
    names: Sequence[str],
    description: str,
    *,
    pieces: Pieces | None = None,
    executor: Executor | None = None,
) -> Iterator[Result]:
    """The result of every piece, in order; what is there is not computed again.

    Args:
        compute: from the number of a piece to its result; other processes get it by pickle.
        names: of the pieces, which are those of their files.
        description: for progress bars.
        pieces: where results are kept; nowhere when left out.
        executor: where to compute; here when left out.

    Raises:
        FormatError: the file of a piece is damaged.
    """
    pieces = pieces or Pieces(None)
    if executor is None or isinstance(executor, InProcess):
        for number, name in enumerate(track(names, description)):
            result = pieces.read(name)
            if result is None:
                result = compute(number)
                pieces.write(name, result)
            yield result
    elif pieces.folder is not None:
        yield from _elsewhere(KeptWork(compute, tuple(names), description, pieces), executor)
    else:
        with executor.scratch() as folder:
            kept = Pieces(folder)
            yield from _elsewhere(KeptWork(compute, tuple(names), description, kept), executor)


@dataclass(frozen=True)
class KeptWork:
    """Pieces whose results are files in a folder, and their own markers."""

    compute: Callable[[int], Result]
    names: tuple[str, ...]
    description: str
    pieces: Pieces

    def __len__(self) -> int:
        return len(self.names)

    def done(self, piece: int) -> bool:
        """Whether the file of the piece is there."""
        return self.pieces.has(self.names[piece])

    def do(self, piece: int) -> None:
        """Compute a piece and write its file."""
        self.pieces.write(self.names[piece], self.compute(piece))


def _elsewhere(work: KeptWork, executor: Executor) -> Iterator[Result]:
    executor.run(work)
    for name in work.names:
        result = work.pieces.read(name)
        if result is None:
            raise FormatError(
                f"{name} was worked out and is not in {work.pieces.folder}: workers on other "
                "machines must see the same folder under the same name"
            )
        yield result


def write_tensors(path: Path, tensors: Result) -> None:
    """Write a safetensors file through a temporary name, so that it is whole or absent."""
    # Two workers may do one piece at the same time, when the first was only thought to be dead.
    partial = partial_path(path)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
