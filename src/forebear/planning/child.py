"""What runs in a process of its own: the work of a command on growing parts of the training set.

The same functions run as for the whole, on a part of the data and in a temporary folder. Facts go
to the planner as lines of JSON, as soon as they are known, so that nothing is lost when the process
has to be ended.
"""

import gc
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from forebear.errors import ForebearError, TaskError
from forebear.planning.measure import (
    FIRST_QUERIES,
    forget_peak,
    ladder,
    measured,
    peak,
    product_seconds,
)

WHOLE = 1024
"""A training set up to this size is sampled whole; a larger one up to a quarter of it."""

PROBE_SECONDS = 3.0
"""Methods say what they refuse before their first pass; so long it may take to get there."""

BATCHES = (64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Request:
    """What a child is to do.

    Attributes:
        file: that defines `task()`, `train()` and `queries()`.
        kind: `"survey"`, `"attribute"`, or `"index"` (a store is built).
        method: registered name.
        options: of the method.
        queries: to score; those of the file over and over when it has fewer, all of it when 0.
        seconds: to spend on samples.
        dtype: of a store.
        batch_size: examples at a time while a store is built.
        first: examples of the first sample.
    """

    file: str
    kind: str
    method: str = ""
    options: dict[str, Any] | None = None
    queries: int = 0
    seconds: float = 5.0
    dtype: str = "bfloat16"
    batch_size: int = 512
    first: int = 256


class Subject:
    """A file's task with parts of its data."""

    def __init__(self, module: ModuleType, queries: int) -> None:
        from forebear.data import Data

        self.module = module
        self.task = module.task()
        ids = module.ids() if hasattr(module, "ids") else None
        self.train = Data.of(module.train(), ids=ids, collate=self.task.collate)
        self.asked = Data.of(module.queries(), collate=self.task.collate)
        self.queries = queries or len(self.asked)
        self.now = (len(self.train), self.queries)

    @property
    def rows(self) -> Any:
        """Positions of as many examples as are wanted now, evenly from the whole."""
        import torch

        count = self.now[0]
        return torch.arange(count) * len(self.train) // count

    def training_part(self) -> Any:
        """These examples."""
        return _picked(self.train, self.rows, self.train.ids[self.rows.numpy()])

    def columns_part(self) -> dict[str, Any]:
        """Their values to filter by."""
        import numpy as np

        rows = self.rows.numpy()
        return {name: np.asarray(values)[rows] for name, values in self.module.columns().items()}

    def queries_part(self) -> Any:
        """As many queries as are wanted now, over and over if there are fewer."""
        import numpy as np
        import torch

        count = self.now[1]
        if count <= len(self.asked):
            return self.asked.slice(slice(0, count))
        return _picked(self.asked, torch.arange(count) % len(self.asked), np.arange(count))

    def definitions(self) -> dict[str, Callable[[], Any]]:
        """What the temporary file defines."""
        found = {
            "task": lambda: self.task,
            "train": self.training_part,
            "queries": self.queries_part,
        }
        if hasattr(self.module, "examples"):
            found["examples"] = self.module.examples
        if hasattr(self.module, "columns"):
            found["columns"] = self.columns_part
        return found


subject: Subject
"""Of this process; the temporary file reads it."""

FILE = """from forebear.planning import child

globals().update(child.subject.definitions())
"""


def main() -> None:
    """Do what the request on the command line says."""
    global subject
    sent = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the file prints must not come between the facts

    def tell(event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, **facts}), file=sent, flush=True)

    request = Request(**json.loads(sys.argv[1]))
    warnings.simplefilter("ignore")
    try:
        from forebear.task_file import importable, imported

        path = Path(request.file)
        with importable(path.resolve().parent):
            subject = Subject(imported(path), request.queries)
            tell("loaded", memory=peak(), processor=time.process_time(), **_facts(subject))
            (survey if request.kind == "survey" else samples)(request, tell)
    except ForebearError as error:
        tell("refused", reason=" ".join(str(error).split()))
    except MemoryError:
        tell("failed", reason="the sample did not fit into memory")
    except Exception as error:
        tell("failed", reason=f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])


def samples(request: Request, tell: Callable[..., None]) -> None:
    """Time the work on growing parts of the data, until time or data are used up."""
    from forebear import methods
    from forebear.planning.terms import PASSES, Facts, smallest_sample, terms_of

    configured = methods.get(request.method, **(request.options or {}))
    facts = Facts(**_facts(subject))
    _require_usable(request, configured)
    terms = terms_of(request.method, configured, facts)
    tell("terms", terms=terms)
    full = facts.examples
    first = min(full, max(request.first, smallest_sample(configured, facts)))
    most = full if full <= WHOLE else max(first, WHOLE, full // 4)
    queries = facts.queries if request.kind == "attribute" else 0
    ends = time.perf_counter() + request.seconds

    def run(n: int, q: int) -> float:
        subject.now = (n, q)
        point = measured(lambda out: _work(request, out), n / full)
        tell("point", examples=n, queries=q, **point)
        return point["seconds"]

    power = 1 if terms == PASSES else 2
    ladder(run, first, most, queries, lambda: ends - time.perf_counter(), power)
    tell("done")


def survey(request: Request, tell: Callable[..., None]) -> None:
    """Time plain passes at several batch sizes, and products in bfloat16 and float32."""
    from forebear.record import plain_pass_seconds

    tell("products", **{name: product_seconds(name) for name in ("float32", "bfloat16")})
    ends = time.perf_counter() + request.seconds
    for size in BATCHES:
        count = min(2 * size, len(subject.train))
        if count < size:
            break
        subject.now = (count, 1)
        part = subject.training_part()
        forget_peak()
        started = time.perf_counter()
        seconds = plain_pass_seconds(subject.task, part, batch_size=size)
        tell("batch", size=size, seconds=seconds / count, memory=peak())
        if time.perf_counter() + 2 * (time.perf_counter() - started) > ends:
            break


class _Reached(Exception):
    """No error: a method has begun its first pass."""


def _require_usable(request: Request, configured: Any) -> None:
    """Let the method refuse the whole training set, which most do before their first pass."""
    from forebear.methods.features import build_store

    subject.now = (subject.now[0], min(subject.now[1], FIRST_QUERIES))

    def begin() -> None:
        if request.kind == "index":
            with tempfile.TemporaryDirectory() as folder:
                build_store(configured, subject.task, subject.train, Path(folder) / "store")
        else:
            configured.fit(subject.task, subject.train)

    with _stopped_at_first_pass():
        begin()
    gc.collect()


@contextmanager
def _stopped_at_first_pass() -> Iterator[None]:
    from forebear import progress

    class Bars:
        def add_task(self, *_: Any, **__: Any) -> None:
            raise _Reached

    def late(*_: Any) -> None:
        raise _Reached

    token = progress._current.set(Bars())  # type: ignore[arg-type]
    alarm = hasattr(signal, "setitimer")
    before = signal.signal(signal.SIGALRM, late) if alarm else None
    try:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, PROBE_SECONDS)
        yield
    except _Reached:
        pass
    finally:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        progress._current.reset(token)


def _work(request: Request, folder: Path) -> None:
    """What the command does, with a file in place of the user's that defines parts of its data."""
    from forebear.pipeline import attribute_file, index_file

    path, options = folder / Path(request.file).name, request.options or {}
    path.write_text(FILE)
    try:
        if request.kind == "attribute":
            attribute_file(path, request.method, options, folder / "out")
            return
        index_file(
            path,
            request.method,
            options,
            folder / "out",
            dtype=request.dtype,  # type: ignore[arg-type]
            batch_size=request.batch_size,
        )
    except TaskError as error:
        # Limits are shared out, so its numbers are not those of the whole; its remedy is.
        raise TaskError(f"refused on {subject.now[0]} examples: {error}") from error


def _facts(about: Subject) -> dict[str, Any]:
    parameters = [p for p in about.task.model.parameters() if p.requires_grad]
    return {
        "examples": len(about.train),
        "queries": about.queries,
        "parameters": sum(p.numel() for p in parameters),
        "outputs": _outputs(about),
        "step": _step(about),
        "itemsize": parameters[0].element_size() if parameters else 4,
    }


def _outputs(about: Subject) -> int:
    """Rows of the Gauss-Newton matrix for each example; one where the loss does not tell."""
    from forebear.curvature.roots import rows_per_example
    from forebear.plan import make_plan
    from forebear.stream import Stream

    try:
        few = about.train.slice(slice(0, min(2, len(about.train))))
        return rows_per_example(Stream(about.task, make_plan(about.task, few), few))
    except ForebearError:
        return 1


def _step(about: Subject) -> int:
    """Examples at a time of the method that takes least memory for each; see `Stream.held`."""
    from forebear.plan import make_plan
    from forebear.stream import BATCH, fitting

    try:
        held = make_plan(about.task, about.train.slice(slice(0, 2))).held
    except ForebearError:
        return BATCH
    points = len(getattr(about.task.loss, "parts", (None,)))
    return fitting(2 * (held.pass_ // points + held.written), BATCH)


def _picked(data: Any, rows: Any, ids: Any) -> Any:
    from torch.utils.data import Subset

    from forebear.data import Data

    if data.columns is not None:
        return Data(data.batch(rows), ids=ids)
    return Data(Subset(data.dataset, rows.tolist()), ids=ids, collate=data.own_collate)


def encoded(request: Request) -> str:
    """A request for the command line of a child."""
    return json.dumps(asdict(request))
