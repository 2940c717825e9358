"""A Ray cluster: of this machine, or any that has an address."""

import logging
import os
import socket
import time
import uuid
import warnings
from collections.abc import Generator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from forebear.errors import ForebearError, MissingDependencyError
from forebear.executors.base import Work, missing, require_positive, temporary_folder
from forebear.executors.shipping import Shipment, Surroundings
from forebear.executors.worker import Outcome, Seen, attempt
from forebear.progress import track

COPIED = 2**26
"""Arrays of up to so many bytes are copied out of Ray's memory, which cannot be written to."""

SEEN_AFTER = 5.0
"""Seconds in which a file that another machine wrote must come into sight."""


@dataclass(frozen=True)
class Ray:
    """Pieces as tasks of a Ray cluster.

    Without an address the pieces run on this machine, on a cluster that is started once and lives
    as long as this process; where Ray is connected already, that cluster is used. Workers need the
    same Python packages, and the folders that results go to under the same names. Data and model go
    to each machine once, and its workers share them.

    Attributes:
        address: `"auto"`, `"host:6379"`, `"ray://host:10001"`; None for this machine.
        workers: most pieces at a time.
        threads: of torch in each, and processors that Ray sets aside for it.
        attempts: how often a piece is tried whose worker or machine dies.
        scratch_folder: where intermediate results go: a folder that all machines share. A temporary
            one of this machine when left out.
    """

    address: str | None = None
    workers: int = 2
    threads: int = 1
    attempts: int = 3
    scratch_folder: str | Path | None = None

    leads = True

    def __post_init__(self) -> None:
        require_positive(self, "workers", "threads", "attempts")

    def run(self, work: Work) -> None:
        """Do every piece that is not done, in any order.

        Raises:
            MissingDependencyError: Ray is not installed.
            ForebearError: the cluster cannot be reached or is too small, workers write to folders
                that are not here, or a piece was lost with its worker more often than is tried
                again.
            Exception: what a piece raised, with the worker's traceback as a note; pieces that run
                are stopped.
        """
        pieces = missing(work)
        if not pieces:
            return
        self._connect()
        with closing(self._finished(work, pieces)) as finished:
            for _ in track(finished, work.description, total=len(pieces)):
                pass
        _require_seen(work, self.address)

    def scratch(self) -> AbstractContextManager[Path]:
        """A temporary folder in `scratch_folder`."""
        return temporary_folder(self.scratch_folder)

    def _connect(self) -> None:
        ray = _ray()
        if not ray.is_initialized():
            if self.address is None:
                _start(self.workers * self.threads)
            else:
                _join(self.address)
        elif self.address is not None:
            _require_address(self.address)
        most = max(
            (node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0
        )
        if most < self.threads:
            raise ForebearError(
                f"threads is {self.threads} and no machine of the cluster has more than "
                f"{most:g} processors: ask for fewer threads"
            )

    def _finished(self, work: Work, pieces: list[int]) -> Generator[int]:
        """Give out all pieces; yields each when it is done."""
        ray = _ray()
        surroundings = ray.put((Surroundings.here(self.threads), uuid.uuid4().hex))
        shipment = Shipment.of(work)
        content = ray.put((shipment.content, list(map(_array, shipment.buffers)), shipment.written))
        task = ray.remote(_piece).options(num_cpus=self.threads, max_retries=self.attempts - 1)
        waiting, running, known = iter(pieces), {}, set[Seen]()
        try:
            while True:
                while len(running) < self.workers and (piece := next(waiting, None)) is not None:
                    running[task.remote(surroundings, content, piece)] = piece
                if not running:
                    return
                for done in ray.wait(list(running), num_returns=1)[0]:
                    piece = running.pop(done)
                    self._outcome(done, piece, work).settle(known, "a Ray worker")
                    yield piece
        finally:
            for left in running:
                ray.cancel(left, force=True)

    def _outcome(self, done: Any, piece: int, work: Work) -> Outcome:
        ray = _ray()
        try:
            return cloudpickle.loads(ray.get(done))
        except ray.exceptions.RayError as error:
            times = "once" if self.attempts == 1 else f"{self.attempts} times"
            reason = str(error).strip().partition("\n")[0]
            raise ForebearError(
                f"piece {piece} of {work.description} was lost {times} with its worker ({reason}); "
                "if memory ran out, use fewer workers or smaller batches. Pieces that are done are "
                "kept"
            ) from error


def _piece(surroundings: tuple[Surroundings, str], content: Any, piece: int) -> bytes:
    """Runs in a worker: one piece, of work that is unpacked when it is not that of before."""
    here, key = surroundings

    def work() -> Work:
        if key not in _unpacked:
            _unpacked.clear()
            here.take()
            _unpacked[key] = _unpack(*content)
        return _unpacked[key]

    return cloudpickle.dumps(attempt(work, piece))


_unpacked: dict[str, Work] = {}


def _unpack(content: bytes, buffers: list[Any], written: tuple[bool, ...]) -> Work:
    """Work from Ray's memory: what is large and only read stays where it is."""
    kept = tuple(
        array.copy() if write or array.nbytes <= COPIED else array
        for array, write in zip(buffers, written, strict=True)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return Shipment(content, kept, written).unpacked()


def _array(buffer: Any) -> np.ndarray:
    return np.frombuffer(buffer, dtype=np.uint8)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingDependencyError(
            "the ray executor needs ray: pip install 'forebear[cluster]'"
        ) from None
    return ray


def _start(processors: int) -> None:
    """A quiet cluster of this machine; or the one that this process is a job of."""
    if "RAY_ADDRESS" in os.environ:
        _ray().init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _ray().init(
        address="local",
        num_cpus=processors,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _join(address: str) -> None:
    """Connect to a cluster, after a look whether anything answers: Ray would wait for minutes."""
    remedy = "start it with 'ray start --head', or leave the address out to run on this machine"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ForebearError(
                f"no Ray cluster answers at {address} ({error}): {remedy}"
            ) from None
    quiet = {} if address.startswith("ray://") else {"log_to_driver": False}
    try:
        _ray().init(address=address, logging_level=logging.ERROR, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ForebearError(
            f"no connection to a Ray cluster at {address} ({error}): {remedy}. A cluster that was "
            "started with tokens needs RAY_AUTH_MODE=token in the environment"
        ) from error


def _require_address(address: str) -> None:
    """Refuse another cluster than the one that this process is connected to."""
    if address == "auto" or address.startswith("ray://"):
        return
    joined = str(_ray().get_runtime_context().gcs_address)
    # One machine has several names, and ports tell its clusters apart.
    if joined.rpartition(":")[2] != address.rpartition(":")[2]:
        raise ForebearError(
            f"this process is connected to the Ray cluster at {joined} and not to {address}: call "
            "ray.shutdown() first"
        )


def _require_seen(work: Work, address: str | None) -> None:
    """Refuse results that workers wrote where this process does not see them."""
    until = time.monotonic() + SEEN_AFTER
    while lacking := missing(work):
        if time.monotonic() > until:
            raise ForebearError(
                f"piece {lacking[0]} of {work.description} was done on the Ray cluster "
                f"{address or 'of this machine'} and its result is not here: workers must see the "
                "same folders under the same names; give a shared one, for intermediate results "
                "as scratch_folder="
            )
        time.sleep(0.2)
