"""What a worker does with a piece, wherever it is, and what it says of it."""

import os
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue

import cloudpickle

from forebear.errors import ForebearError, ForebearWarning
from forebear.executors import shipping
from forebear.executors.base import Work


@dataclass(frozen=True)
class Seen:
    """A warning, ready to be raised again elsewhere."""

    text: str
    category: type[Warning]
    filename: str
    line: int


@dataclass(frozen=True)
class Outcome:
    """How a piece went.

    Attributes:
        piece: its number.
        warnings: those that were raised.
        error: the exception, pickled; None when the piece is done.
        trace: the worker's traceback.
    """

    piece: int
    warnings: tuple[Seen, ...] = ()
    error: bytes | None = None
    trace: str = ""

    def settle(self, known: set[Seen], where: str) -> None:
        """Raise here what was raised there: warnings that are not `known`, then the exception."""
        for seen in self.warnings:
            if seen not in known:
                known.add(seen)
                warnings.warn_explicit(seen.text, seen.category, seen.filename, seen.line)
        if self.error is not None:
            error = cloudpickle.loads(self.error)
            error.add_note(f"raised in {where}, piece {self.piece}:\n{self.trace}")
            raise error


def attempt(work: Callable[[], Work], piece: int) -> Outcome:
    """Do one piece of what `work` gives; whatever it raises is part of the outcome."""
    failed: BaseException | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ForebearWarning)  # the other side has its own filters
        try:
            work().do(piece)
        except BaseException as error:
            failed = error
    seen = tuple(Seen(str(w.message), w.category, w.filename, w.lineno) for w in caught)
    if failed is None:
        return Outcome(piece, seen)
    trace = "".join(traceback.format_exception(failed)).rstrip()
    return Outcome(piece, seen, _pickled(failed), trace)


def _pickled(error: BaseException) -> bytes:
    """The exception, or its name and text where it does not come through pickle whole."""
    try:
        content = cloudpickle.dumps(error)
        if type(cloudpickle.loads(content)) is type(error):
            return content
    except Exception:
        pass
    return cloudpickle.dumps(ForebearError(f"{type(error).__qualname__}: {error}"))


def serve(pieces: int, file: int, parent: int) -> None:
    """The life of a worker process: pieces by number, until the driver lets go or dies.

    Args:
        pieces: an open connection that gives numbers and takes outcomes.
        file: the open file of the work.
        parent: the number of the process that started this one and ends it by ending.
    """
    connection = Connection(pieces)
    numbers: SimpleQueue[int] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, numbers, parent), daemon=True).start()
    kept: list[Work] = []

    def work() -> Work:
        if not kept:
            kept.append(shipping.mapped(file))
        return kept[0]

    while True:
        outcome = cloudpickle.dumps(attempt(work, numbers.get()))
        try:
            connection.send_bytes(outcome)
        except OSError:  # the driver is gone
            os._exit(1)


def _listen(connection: Connection, numbers: "SimpleQueue[int]", parent: int) -> None:
    """Take numbers; end the process, whatever it is doing, when there is no driver any more."""
    try:
        while True:
            # The pipe stays open while any other child of a killed driver lives, so ask too.
            while not connection.poll(1.0):
                if os.getppid() != parent:
                    os._exit(1)
            numbers.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)
