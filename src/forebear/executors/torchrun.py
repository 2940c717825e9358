"""Work shared among the processes of a program that `torchrun` started.

All of them run the same program and share the pieces. Processes that hold one sharded model
together (FSDP2) also make their passes together, see `forebear.sharding`: whoever has no examples
left repeats its last pass for nothing, as long as another one needs the parameters it holds.
"""

import atexit
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from forebear.errors import ForebearError
from forebear.executors.base import Work, missing
from forebear.progress import track
from forebear.sharding import together

Result = TypeVar("Result")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others, whose pieces may take much longer than its own."""

PAUSE = 0.25
"""Seconds that a program which is done leaves to the threads of its process group."""

# What a process says before a pass: a number below is a state, any other the kind of its pass.
DONE, FAILED, IDLE, KINDS = 0, 1, 2, 3


@dataclass(frozen=True)
class Torchrun:
    """The processes of this program, started by `torchrun --nproc-per-node N program.py`.

    Process r does the missing pieces r, r + N, and so on. A program that is killed, all of it or
    one process, goes on with what is missing when it is started again. The process group is the
    one the program made or, if it made none, one made here: gloo for CPUs and NCCL for GPUs.

    Attributes:
        scratch_folder: where results that nobody keeps pass through; a folder that all processes
            see. The temporary folder of the machine when None, which is enough for one machine.

    Raises:
        ForebearError: the program was not started by torchrun.
    """

    scratch_folder: str | Path | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which writes what there is only once."""
        return dist.get_rank(_members()) == 0

    def run(self, work: Work) -> None:
        """Do every piece that is not done; returns in all processes when all are through.

        Raises:
            Exception: what a piece raised, in all processes; other pieces are done first, unless
                the model is sharded.
        """
        members = _members()
        lacking: list[int] = _from_first(lambda: missing(work), members)
        if not lacking:
            return
        rank = dist.get_rank(members)
        own = lacking[rank :: dist.get_world_size(members)]
        rounds = _Rounds(members)
        failure: Exception | None = None
        try:
            with together(rounds):
                for piece in track(own, work.description):
                    work.do(piece)
                # Twice does no harm, and leaves this process something to repeat.
                rounds.follow(lambda: work.do(lacking[0]))
        except _ElsewhereError:
            pass
        except Exception as error:
            if rounds.alone:
                raise
            rounds.fail()
            failure = error
        _raise_together(failure, members)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder made by the first process, gone when all have left the block."""
        members = _members()
        folder = _from_first(
            lambda: tempfile.mkdtemp(prefix="forebear-", dir=self.scratch_folder), members
        )
        try:
            yield Path(folder)
            dist.barrier(members)
        finally:
            if self.leads:
                shutil.rmtree(folder, ignore_errors=True)


class _ElsewhereError(Exception):
    """Another process failed."""


class _Rounds:
    """Passes made together: before each, all processes say what they are about to do.

    Attributes:
        alone: the others cannot be talked to: one has died, or an error came here in the middle of
            a pass, in which they wait.
    """

    def __init__(self, members: dist.ProcessGroup) -> None:
        self.alone = False
        self._members = members
        self._said_failed = False
        self._repeats: dict[int, Callable[[], object]] = {}

    def step(self, kind: str, compute: Callable[[], Result], again: Callable[[], object]) -> Result:
        """Compute when it is this kind's turn."""
        own = KINDS + zlib.crc32(kind.encode())
        while (turn := self._turn(own)) != own:
            if turn != IDLE:
                self._repeat(turn)
        value = self._make(compute)
        self._repeats[own] = again
        return value

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """All processes leave the block, or none does."""
        try:
            yield
        except ForebearError:
            self.fail()
            raise
        if FAILED in self._say(DONE):
            raise _ElsewhereError

    def follow(self, spare: Callable[[], object]) -> None:
        """Join the passes of the others until all are through.

        Args:
            spare: any piece, done by a process that had none when others need its parameters.
        """
        own = DONE if self._repeats else IDLE
        while (turn := self._turn(own)) != DONE:
            if turn == IDLE:
                if own == IDLE:
                    spare()
                    own = DONE
            else:
                self._repeat(turn)

    def fail(self) -> None:
        """Tell the others, where they do not know yet."""
        if not self._said_failed:
            self._said_failed = True
            self._say(FAILED)

    def _turn(self, own: int) -> int:
        """Whose kind of pass is next; `IDLE` while processes need something to repeat."""
        said = self._say(own)
        if FAILED in said:
            raise _ElsewhereError
        kinds = [code for code in said if code >= KINDS]
        if not kinds:
            return DONE
        return IDLE if IDLE in said else min(kinds)

    def _repeat(self, kind: int) -> None:
        if kind not in self._repeats:
            self.alone = True
            raise ForebearError(
                "another process makes a pass of the sharded model that this one never made: "
                "pieces must make the same passes"
            )
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):  # whatever it draws was not asked for
            self._make(self._repeats[kind])

    def _make(self, compute: Callable[[], Result]) -> Result:
        try:
            return compute()
        except (ForebearError, _ElsewhereError):
            raise
        except Exception as error:
            self.alone = True
            error.add_note(
                "in the middle of a pass of a sharded model: the other processes wait for this "
                "one, so let the program end, and torchrun will end them"
            )
            raise

    def _say(self, code: int) -> list[int]:
        """What each process says."""
        said = [
            torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(self._members))
        ]
        try:
            dist.all_gather(said, torch.tensor([code]), group=self._members)
        except RuntimeError as error:
            self.alone = True
            raise ForebearError(
                "another process of the program has died: what is done stays done, so start the "
                "program again"
            ) from error
        return [int(one) for one in said]


_groups: dict[Any, Any] = {}


def _members() -> dist.ProcessGroup:
    """All processes of the program, as a group that talks about work and waits long."""
    if not dist.is_initialized():
        _initialise()
    everyone: Any = dist.group.WORLD
    if everyone not in _groups:
        _groups.clear()  # of a process group that the program has destroyed
        _groups[everyone] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups[everyone]


def _initialise() -> None:
    lacking = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if lacking:
        raise ForebearError(
            f"this program is not one of several processes ({lacking[0]} is not set): start it "
            "with `torchrun --nproc-per-node N program.py`"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    atexit.register(_destroy)


def _destroy() -> None:
    _groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
        # Sharded parameters leave torch a cache that holds the group and so its threads, which may
        # still have tensors of the last exchange to let go. That takes the interpreter; while it is
        # ending, it takes the whole program down (SIGABRT). So they get some time before.
        time.sleep(PAUSE)


def _from_first(make: Callable[[], Result], members: dist.ProcessGroup) -> Result:
    """What the first process makes, in all of them; what it raises too."""
    made: list[Any] = [None, None]
    if dist.get_rank(members) == 0:
        try:
            made[0] = make()
        except Exception as error:
            made[1] = error
    dist.broadcast_object_list(made, group=members, group_src=0)
    if made[1] is not None:
        raise made[1]
    return made[0]


def _raise_together(failure: Exception | None, members: dist.ProcessGroup) -> None:
    """Raise in all processes what one of them has met; each its own if several have."""
    found: list[Any] = [None] * dist.get_world_size(members)
    dist.all_gather_object(found, _portable(failure), group=members)
    if failure is not None:
        raise failure
    for rank, error in enumerate(found):
        if error is not None:
            error.add_note(f"raised in process {rank} of {len(found)}")
            raise error


def _portable(error: Exception | None) -> Exception | None:
    """An error that can be sent: itself, or its text."""
    import pickle

    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return ForebearError(f"{type(error).__name__}: {error}")
