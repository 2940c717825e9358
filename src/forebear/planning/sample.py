"""Samples in processes of their own: what a method does there cannot harm the planner."""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forebear.errors import ForebearError
from forebear.planning.child import Request, encoded
from forebear.planning.cost import Point
from forebear.planning.terms import PASSES, Facts

LOOK = 0.05
"""Seconds between looks at a child's memory."""

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass
class Sample:
    """What a child found out.

    Attributes:
        start: seconds until the file was loaded.
        loaded_memory: highest resident bytes until then.
        loaded_processor: seconds of all processors until then.
        facts: of the task; None if the file could not be loaded.
        terms: of the method's cost.
        points: timed runs, the first with what every process pays once.
        batches: plain passes: batch size, seconds an example, memory.
        products: seconds of a product by precision.
        refused: why the method cannot be used.
        stopped: why the child was ended, or failed, before it was done.
        seconds: that all of it took.
    """

    start: float = 0.0
    loaded_memory: float = 0.0
    loaded_processor: float = 0.0
    facts: Facts | None = None
    terms: tuple[str, ...] = PASSES
    points: list[Point] = field(default_factory=list)
    batches: list[dict[str, float]] = field(default_factory=list)
    products: dict[str, float] = field(default_factory=dict)
    refused: str | None = None
    stopped: str | None = None
    seconds: float = 0.0


def take(request: Request, *, memory: float, patience: float) -> Sample:
    """Run a request in a child and gather what it says.

    Args:
        request: what to do.
        memory: bytes; a child that is larger is ended.
        patience: seconds after loading until the child is ended, besides its own time.
    """
    sample, started = Sample(), time.perf_counter()
    command = [sys.executable, "-c", "from forebear.planning.child import main; main()"]
    # What an ended child leaves behind goes with the folder.
    with tempfile.TemporaryDirectory(prefix="forebear-plan-") as folder:
        child = subprocess.Popen(
            [*command, encoded(request)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "TMPDIR": folder},
        )
        try:
            sample.stopped = _follow(child, sample, request, memory, patience, started)
        finally:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
    sample.seconds = time.perf_counter() - started
    return sample


def _follow(
    child: subprocess.Popen[bytes],
    sample: Sample,
    request: Request,
    memory: float,
    patience: float,
    started: float,
) -> str | None:
    """Read what the child says until it ends or has to be ended; why it did not end by itself."""
    assert child.stdout is not None
    descriptor = child.stdout.fileno()
    rest, ends = b"", float("inf")
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if selector.select(LOOK):
                content = os.read(descriptor, 65536)
                if not content:
                    break
                *lines, rest = (rest + content).split(b"\n")
                for line in lines:
                    _note(sample, json.loads(line), time.perf_counter() - started)
                if sample.facts is not None and ends == float("inf"):
                    ends = time.perf_counter() + request.seconds + patience
            used = _resident(child.pid)
            if used > memory:
                return f"a sample took more than {memory / 1e9:.3g} GB of memory"
            if time.perf_counter() > ends:
                return f"a sample took more than {request.seconds + patience:.3g} s"
    code = child.wait()
    if code and not sample.refused and not sample.stopped:
        return f"the sample's process ended with code {code}"
    return sample.stopped


def _note(sample: Sample, said: dict[str, Any], after: float) -> None:
    event = said.pop("event")
    notes: dict[str, Callable[[], None]] = {
        "loaded": lambda: _loaded(sample, said, after),
        "terms": lambda: setattr(sample, "terms", tuple(said["terms"])),
        "point": lambda: sample.points.append(Point(**said)),
        "batch": lambda: sample.batches.append(said),
        "products": lambda: sample.products.update(said),
        "refused": lambda: setattr(sample, "refused", said["reason"]),
        "failed": lambda: setattr(sample, "stopped", said["reason"]),
        "done": lambda: None,
    }
    notes[event]()


def _loaded(sample: Sample, said: dict[str, Any], after: float) -> None:
    sample.start, sample.loaded_memory = after, said.pop("memory")
    sample.loaded_processor = said.pop("processor")
    sample.facts = Facts(**said)


def _resident(pid: int) -> int:
    """Resident bytes of a process; zero where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def require_loaded(sample: Sample) -> Facts:
    """What is known about the task.

    Raises:
        ForebearError: the file could not be loaded, with the reason.
    """
    if sample.facts is None:
        reason = sample.refused or sample.stopped or "its process said nothing"
        raise ForebearError(f"nothing could be planned: {reason}")
    return sample.facts
