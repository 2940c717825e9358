"""Other processes of this machine, of which any may die."""

import signal
from collections import Counter, deque
from collections.abc import Generator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, cast

import cloudpickle

from forebear.errors import ForebearError
from forebear.executors import forks, shipping
from forebear.executors.base import Work, missing, require_positive, temporary_folder
from forebear.executors.interrupts import held
from forebear.executors.worker import Outcome, Seen
from forebear.progress import track


@dataclass(frozen=True)
class Processes:
    """Several pieces at a time, each in a process of its own.

    A worker that dies loses its piece, which another worker does again. When the driver dies, its
    workers end too, and the same call goes on where they stopped. Data and model are written to a
    temporary file without a name once, and workers map it: memory holds them once more than before,
    however many workers there are.

    Attributes:
        workers: processes.
        threads: of torch in each. Numbers are bit for bit those of a process with as many threads.
        attempts: how often a piece is tried whose worker dies.
    """

    workers: int = 2
    threads: int = 1
    attempts: int = 3

    leads = True

    def __post_init__(self) -> None:
        require_positive(self, "workers", "threads", "attempts")

    def run(self, work: Work) -> None:
        """Do every piece that is not done, in any order.

        Raises:
            ForebearError: the work cannot be pickled, or a piece was lost with its worker more
                often than is tried again.
            Exception: what a piece raised, with the worker's traceback as a note; the other
                workers are stopped.
        """
        pieces = missing(work)
        if not pieces:
            return
        with (
            shipping.write(work, self.threads) as file,
            closing(_Crew(self, work, file.fileno()).finished(pieces)) as finished,
        ):
            for _ in track(finished, work.description, total=len(pieces)):
                pass

    def scratch(self) -> AbstractContextManager[Path]:
        """A temporary folder."""
        return temporary_folder()


@dataclass
class _Worker:
    """A process, and the piece that it is at."""

    process: forks.Process
    connection: Connection
    piece: int

    @classmethod
    def start(cls, file: int, threads: int, path: list[str], piece: int) -> "_Worker":
        ours, theirs = (cast(Connection, end) for end in Pipe())
        worker = cls(forks.start(theirs, file, threads, path), ours, piece)
        worker.give(piece)
        return worker

    def give(self, piece: int) -> None:
        """Let it do a piece; whether it died is found out when it is heard."""
        self.piece = piece
        try:
            self.connection.send(piece)
        except OSError:
            self.process.kill()

    def outcome(self) -> Outcome | None:
        """What it says, None when it died."""
        try:
            # Its own children may keep the connection of a dead one open, with nothing to come.
            if self.connection.poll():
                return cloudpickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            pass
        return None

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.connection.close()
        self.process.wait()


class _Crew:
    """The workers of one run."""

    def __init__(self, settings: Processes, work: Work, file: int) -> None:
        self.settings = settings
        self.work = work
        self.file = file
        self.workers: list[_Worker] = []
        self.lost: Counter[int] = Counter()

    def finished(self, pieces: list[int]) -> Generator[int]:
        """Give out all pieces; yields each when it is done. Closing it ends the workers."""
        waiting, known = deque(pieces), set[Seen]()
        try:
            while waiting and len(self.workers) < self.settings.workers:
                self._hire(waiting.popleft())
            while self.workers:
                for worker in self._heard():
                    piece, outcome = worker.piece, worker.outcome()
                    if outcome is not None:
                        outcome.settle(known, f"worker process {worker.process.pid}")
                        if waiting:
                            worker.give(waiting.popleft())
                        else:
                            self._dismiss(worker)
                        yield piece
                        continue
                    self._dismiss(worker)
                    if self.work.done(piece):
                        yield piece
                    else:
                        self._count(piece, worker.process)
                        waiting.appendleft(piece)
                    if waiting:
                        self._hire(waiting.popleft())
        finally:
            with held():
                for worker in self.workers:
                    worker.process.kill()
                for worker in self.workers:
                    worker.stop()

    def _heard(self) -> list[_Worker]:
        """Workers that have something to say or have died."""
        connections: list[Any] = [worker.connection for worker in self.workers]
        while True:
            ready = wait(connections, timeout=1.0)
            if ready:
                return [worker for worker in self.workers if worker.connection in ready]
            if dead := [worker for worker in self.workers if worker.process.poll() is not None]:
                return dead

    def _hire(self, piece: int) -> None:
        threads = self.settings.threads
        path = list(shipping.Surroundings.here(threads).path)
        forks.prepare(threads, path)
        with held():  # or there would be a worker that nobody ends
            self.workers.append(_Worker.start(self.file, threads, path, piece))

    def _dismiss(self, worker: _Worker) -> None:
        with held():
            worker.stop()
            self.workers.remove(worker)

    def _count(self, piece: int, process: forks.Process) -> None:
        self.lost[piece] += 1
        if self.lost[piece] < self.settings.attempts:
            return
        code = process.returncode
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        remedy = (
            "most likely memory ran out: use fewer workers or smaller batches"
            if code == -signal.SIGKILL
            else "standard error may tell why"
        )
        times = "once" if self.lost[piece] == 1 else f"{self.lost[piece]} times"
        raise ForebearError(
            f"piece {piece} of {self.work.description} was lost {times} with its worker "
            f"({reason}); {remedy}. Pieces that are done are kept"
        )
