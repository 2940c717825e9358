"""Worker processes without waiting: forked by a process that has imported torch and nothing more.

To import torch and forebear takes two seconds, to fork a process that has done so some hundredths.
The process that forks runs nothing of a user's, so its children begin like new ones, and it has no
pool of threads, with which a fork would be unsafe.
"""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Protocol, cast

from forebear.executors import worker
from forebear.executors.interrupts import held

# The driver deals with Ctrl-C, which the terminal sends to workers too; `_started` keeps it away
# until here.
PROGRAM = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
sys.path[:] = json.loads(sys.argv[1])
from forebear.executors import forks
forks.{function}(*map(json.loads, sys.argv[2:]))
"""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

IDLE = 60.0
"""Seconds after which the process that forks ends, if nothing is asked of it."""


class Process(Protocol):
    """What a driver needs of a process; `subprocess.Popen` has it."""

    pid: int
    returncode: int | Any

    def kill(self) -> None:
        """End it."""
        ...

    def poll(self) -> int | None:
        """Its exit code when it has ended; minus the number of the signal that killed it."""
        ...

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        ...


def prepare(threads: int, path: list[str]) -> None:
    """Wait until processes can be started at once: seconds the first time, open to Ctrl-C.

    Args:
        threads: of each library.
        path: where modules are found.
    """
    if sys.platform == "linux":
        with suppress(EOFError, OSError):  # it was killed; `start` makes another
            _Nurse.of(threads, path).wait()


def start(pieces: Connection, file: int, threads: int, path: list[str]) -> Process:
    """A process that works on pieces.

    Args:
        pieces: the worker's end of its connection; closed here.
        file: the open file of the work.
        threads: of each library.
        path: where modules are found.
    """
    try:
        if sys.platform != "linux":  # elsewhere system libraries do not bear a fork
            return _started("work", (pieces.fileno(), file), threads, path, os.getpid())
        try:
            return _Nurse.of(threads, path).fork(pieces.fileno(), file, path)
        except (EOFError, OSError):  # it was killed, or had just ended by itself
            return _Nurse.of(threads, path, anew=True).fork(pieces.fileno(), file, path)
    finally:
        pieces.close()


def work(pieces: int, file: int, driver: int) -> None:
    """The life of a worker that was started by itself."""
    worker.serve(pieces, file, driver)


def nurse(control: int, driver: int, modules: list[str]) -> None:
    """The life of the process that forks workers for one driver.

    Args:
        control: the open connection of the driver.
        driver: its number.
        modules: what is imported beforehand.
    """
    for name in modules:
        if os.getppid() != driver:
            return
        with suppress(Exception):  # a worker that needs it says what is wrong
            importlib.import_module(name)
    asked, children = Connection(control), 0
    with suppress(OSError):
        asked.send("ready")
    while True:
        try:
            if not _asked(asked, driver, math.inf if children else IDLE):
                return
            request = asked.recv()
            if request["ask"] == "fork":
                pieces, file = recv_handle(asked), recv_handle(asked)
                own, child = os.getpid(), os.fork()
                if child == 0:
                    asked.close()
                    _be_born(pieces, file, own, request)
                os.close(pieces)
                os.close(file)
                children += 1
                asked.send(child)
            else:
                ended, status = os.waitpid(request["pid"], request["options"])
                children -= bool(ended)
                asked.send(os.waitstatus_to_exitcode(status) if ended else None)
        except (EOFError, OSError):
            os._exit(0)


def _asked(connection: Connection, driver: int, patience: float) -> bool:
    """Whether something is asked within so many seconds, and while the driver lives."""
    end = time.monotonic() + patience
    # The connection stays open while any other child of a killed driver lives, so look too.
    while not connection.poll(1.0):
        if os.getppid() != driver or time.monotonic() > end:
            return False
    return True


def _be_born(pieces: int, file: int, parent: int, request: dict[str, Any]) -> None:
    """What a forked worker does, up to its end."""
    try:
        import numpy as np

        sys.path[:] = request["path"]
        importlib.invalidate_caches()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        np.random.seed()  # noqa: NPY002  forks would all draw the same
        worker.serve(pieces, file, parent)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


class _Nurse:
    """The driver's side of the process that forks."""

    _of: "dict[tuple[int, int], _Nurse]" = {}  # noqa: RUF012  one a process and number of threads

    def __init__(self, threads: int, path: list[str]) -> None:
        ours, theirs = Pipe()
        modules = sorted(name for name in sys.modules if name.startswith("forebear."))
        self.process = _started("nurse", (theirs.fileno(),), threads, path, os.getpid(), modules)
        theirs.close()
        self.control = cast(Connection, ours)
        self.ready = False
        self.lock = threading.Lock()

    @classmethod
    def of(cls, threads: int, path: list[str], *, anew: bool = False) -> "_Nurse":
        key = os.getpid(), threads
        with held():
            known = cls._of.get(key)
            if anew or known is None or known.process.poll() is not None:
                known = cls._of[key] = cls(threads, path)
        return known

    def wait(self) -> None:
        """Return when it has imported everything."""
        while not self.ready:
            if self.control.poll(1.0):  # Ctrl-C may come here, where nothing is half-way
                with held(), self.lock:
                    if not self.ready:  # another thread may have been first
                        self.control.recv()
                        self.ready = True

    def fork(self, pieces: int, file: int, path: list[str]) -> "_Forked":
        environment = {k: v for k, v in os.environ.items() if k not in THREADS}
        about = {"path": path, "environment": environment, "folder": os.getcwd()}
        self.wait()
        return _Forked(self, self._answer({"ask": "fork", **about}, pieces, file))

    def code(self, pid: int, options: int) -> int | None:
        """The exit code of a worker, None while it lives."""
        try:
            return self._answer({"ask": "code", "pid": pid, "options": options})
        except (EOFError, OSError):  # it was killed, and its workers end with it
            return -signal.SIGKILL

    def _answer(self, request: dict[str, Any], *handles: int) -> Any:
        with held(), self.lock:
            try:
                self.control.send(request)
                for handle in handles:
                    send_handle(self.control, handle, self.process.pid)
                return self.control.recv()
            except BaseException:
                # The answer may still come and would be taken for that of the next request. It
                # ends when it is let go, and so do its workers.
                self.control.close()
                raise


class _Forked:
    """A worker that was forked."""

    def __init__(self, parent: _Nurse, pid: int) -> None:
        self.parent = parent
        self.pid = pid
        self.returncode: int | None = None

    def kill(self) -> None:
        if self.returncode is None:  # until it is asked for, nobody else gets its number
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.parent.code(self.pid, os.WNOHANG)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self.parent.code(self.pid, 0)
        assert self.returncode is not None
        return self.returncode


def _started(
    function: str, handles: tuple[int, ...], threads: int, path: list[str], *arguments: Any
) -> "subprocess.Popen[bytes]":
    """A new process that runs a function of this module with open files and arguments."""
    # One started by multiprocessing would run the main program again, guarded or not.
    program = [sys.executable, "-P", "-c", PROGRAM.format(function=function)]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return subprocess.Popen(
            [*program, *map(json.dumps, (path, *handles, *arguments))],
            pass_fds=handles,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **dict.fromkeys(THREADS, str(threads))},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
