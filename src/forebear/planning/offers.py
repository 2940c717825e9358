"""What is offered: ways to do it with their costs, the limits they break, and what would help."""

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forebear.planning.amounts import duration, size
from forebear.planning.child import Request
from forebear.planning.cost import Cost
from forebear.planning.predict import Prediction
from forebear.planning.terms import Facts
from forebear.stream import BATCH


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be used.

    Attributes:
        seconds: of wall-clock time.
        memory: resident bytes of the process.
        disk: bytes written.
    """

    seconds: float
    memory: float
    disk: float


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One way to do it.

    Attributes:
        kind: `"attribute"` scores all pairs; `"index"` builds a store that is searched afterwards.
        method: registered name.
        options: that differ from the method's own.
        command: to copy.
        prediction: time, memory and disk; None where nothing could be measured.
        breaks: limits that it does not keep: `"time"`, `"memory"`, `"disk"`.
        remedy: what would make it fit.
        refused: why the method cannot be used on this task.
        stopped: why its sample ended early, if it did.
    """

    kind: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    prediction: Prediction | None = None
    breaks: tuple[str, ...] = ()
    remedy: str = ""
    refused: str | None = None
    stopped: str | None = None

    @property
    def fits(self) -> bool:
        """Whether all limits are kept."""
        return self.prediction is not None and not self.breaks and not self.prediction.at_least


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a task would cost by every method that can be used.

    Attributes:
        file: of the task.
        facts: sizes of the task.
        limits: that were given.
        offers: those that fit first, the cheapest first; then those that do not; then refusals.
        start: seconds until the file is loaded, part of every prediction.
        batch_size: forebear's own where it is nearly as fast as any and fits the memory, otherwise
            the smallest that is.
        batches: what was measured for it: size, seconds an example, memory.
        speed_of_bfloat16: products in float32 over products in bfloat16, in time.
        sampling_seconds: that planning took.
    """

    file: str
    facts: Facts
    limits: Limits
    offers: tuple[Offer, ...]
    start: float
    batch_size: int
    batches: tuple[dict[str, float], ...]
    speed_of_bfloat16: float
    sampling_seconds: float

    @property
    def fitting(self) -> tuple[Offer, ...]:
        """Offers that keep all limits, the cheapest first."""
        return tuple(offer for offer in self.offers if offer.fits)

    @property
    def recommendation(self) -> str:
        """A sentence or two: what can be run, or what would have to change."""
        if self.fitting:
            count = len({offer.method for offer in self.fitting})
            first, last = self.fitting[0], self.fitting[-1]
            text = f"{count} of {len({o.method for o in self.offers})} methods fit; "
            text += f"the cheapest is {_said(first)}"
            return text + (f", the dearest that fits {_said(last)}." if last != first else ".")
        tried = [offer for offer in self.offers if offer.prediction is not None]
        if not tried:
            return "No method can be used on this task: the reasons are in the table."
        nearest = tried[0]
        what = ", ".join(nearest.breaks) or "time"
        remedy = f": {nearest.remedy}" if nearest.remedy else ""
        return (
            f"Nothing fits. Nearest is {_said(nearest)}, which breaks the limit of {what}{remedy}."
        )


def breaks_of(found: Prediction, limits: Limits, stopped: str | None) -> tuple[str, ...]:
    """Names of the limits that are not kept; a sample may have been stopped by its memory."""
    over = {
        "time": found.seconds.value > limits.seconds,
        "memory": found.memory.value > limits.memory
        or (stopped is not None and "memory" in stopped),
        "disk": found.disk.value > limits.disk,
    }
    return tuple(name for name, broken in over.items() if broken)


def remedy_of(found: Prediction, limits: Limits, kind: str, examples: int, queries: int) -> str:
    """What would have to change, as far as the prediction tells."""
    ways = []
    if found.seconds.value > limits.seconds:
        ways.append(f"--budget {_up(found.seconds.value)}")
    if found.memory.value > limits.memory:
        ways.append(f"--memory {math.ceil(found.memory.value / 1e8) / 10:g}GB")
    if found.disk.value > limits.disk:
        ways.append(f"--disk {math.ceil(found.disk.value / 1e8) / 10:g}GB")
    others = [" and ".join(ways)] if ways else []
    workers = _workers(found, limits)
    if workers and kind == "index":
        others.append(f"{workers:,} workers on other machines (--executor ray:ADDRESS)")
    fewer = _most_examples(found, limits, examples, queries)
    if fewer:
        others.append(f"{fewer:,} of the {examples:,} examples")
    return ", or ".join(others)


def _workers(found: Prediction, limits: Limits) -> int:
    """Workers like this machine that keep the time, if all that grows is divided; 0 if none do."""
    fixed = found.fixed_seconds + found.time_cost.at(0, 0)
    over = found.memory.value > limits.memory or found.disk.value > limits.disk
    if over or found.seconds.value <= limits.seconds or fixed >= limits.seconds:
        return 0
    return math.ceil((found.seconds.value - fixed) / (limits.seconds - fixed))


def _most_examples(found: Prediction, limits: Limits, examples: int, queries: int) -> int:
    """Examples, to two digits, with which the limits are kept; 0 if all are or none."""

    def kept(n: float) -> bool:
        costs: list[tuple[Cost, float]] = [
            (found.time_cost, limits.seconds - found.fixed_seconds),
            (found.memory_cost, limits.memory),
            (found.disk_cost, limits.disk),
        ]
        return all(cost.at(n, queries) <= limit for cost, limit in costs)

    if kept(examples) or not kept(1):
        return 0
    low, high = 1.0, float(examples)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    digits = 10 ** max(0, int(math.log10(low)) - 1)
    return int(low) // digits * digits


def command_of(request: Request) -> str:
    """What to type to do on the whole what a sample did on a part."""
    folder = "runs" if request.kind == "attribute" else "stores"
    words = ["forebear", request.kind, request.file, "--method", request.method]
    for key, value in (request.options or {}).items():
        words += ["--option", f"{key}={value}"]
    if request.batch_size != BATCH:
        words += ["--batch-size", str(request.batch_size)]
    return shlex.join([*words, "--out", f"{folder}/{Path(request.file).stem}-{request.method}"])


def _said(offer: Offer) -> str:
    assert offer.prediction is not None
    settings = "".join(f" {key}={value}" for key, value in offer.options.items())
    what = "a store of " if offer.kind == "index" else ""
    found = offer.prediction
    more = "more than " if found.at_least else ""
    return (
        f"{what}{offer.method}{settings} ({more}{duration(found.seconds.value)}, "
        f"{size(found.memory.value)} of memory, {size(found.disk.value)} of disk)"
    )


def _up(seconds: float) -> str:
    """A time that is enough, as `--budget` takes it."""
    if seconds < 120:
        return f"{math.ceil(seconds)}s"
    if seconds < 7200:
        return f"{math.ceil(seconds / 60)}m"
    return f"{math.ceil(seconds / 3600)}h"
