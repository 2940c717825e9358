"""Samples of one method after another, and settings that keep the limits."""

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forebear import methods
from forebear.errors import ForebearError
from forebear.planning.child import Request
from forebear.planning.offers import Limits, Offer, Plan, breaks_of, command_of, remedy_of
from forebear.planning.predict import predicted
from forebear.planning.sample import Sample, require_loaded, take
from forebear.planning.terms import Facts
from forebear.stream import BATCH

SHARE = 0.05
"""Of the time limit that samples may take."""

MOST_SECONDS = 60.0
"""That samples may take, however much time there is; loading comes on top."""

LEAST_SECONDS = 1.0
"""For the samples of one choice of settings."""

PATIENCE = 20.0
"""Seconds, at least, that a sample may take longer than it should before it is ended."""

FIRST = (64, 256)
"""Fewest and most examples of the first sample; the lists of a run keep up to 50."""

DIMENSIONS = (512, 1024, 2048, 4096, 8192)

FAST = 1.2
"""How much faster products in bfloat16 must be to be worth less precise scores."""

NEAR = 1.1
"""Batch sizes whose time an example is within this factor of the best are as good."""


def plan_file(
    path: str | Path,
    limits: Limits,
    *,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    queries: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Predict the cost of attributing what a file defines, by every method or by one.

    Nothing is written, except for temporary files.

    Args:
        path: a file that defines `task()`, `train()` and `queries()`.
        limits: of time, memory and disk.
        method: a registered name; all when None.
        options: of that method; they are kept as they are.
        queries: to plan for; as many as the file has when 0.
        tell: called with a line on what is being sampled.

    Raises:
        ForebearError: the file cannot be loaded.
        UnknownNameError: there is no such method or option.
    """
    started = time.perf_counter()
    options = dict(options or {})
    if method is not None:
        methods.get(method, **options)
    names = [method] if method is not None else list(methods.METHODS)
    budget = min(SHARE * limits.seconds, MOST_SECONDS)
    tell("plain passes")
    about = take(
        Request(file=str(path), kind="survey", queries=queries, seconds=min(5.0, budget / 4)),
        memory=limits.memory,
        patience=max(60.0, limits.seconds),
    )
    facts = require_loaded(about)
    batch_size = _batch_size(about, limits)
    planner = _Planner(
        file=str(path),
        limits=limits,
        facts=facts,
        queries=queries,
        left=budget,
        speed_of_bfloat16=_speed(about),
        batch_size=batch_size,
        plain_seconds=min((b["seconds"] for b in about.batches), default=0.0),
        tell=tell,
    )
    offers = [
        offer
        for k, name in enumerate(names)
        for offer in planner.offers(name, options, len(names) - k)
    ]
    return Plan(
        file=str(path),
        facts=facts,
        limits=limits,
        offers=tuple(sorted(offers, key=_order)),
        start=about.start,
        batch_size=batch_size,
        batches=tuple(about.batches),
        speed_of_bfloat16=_speed(about),
        sampling_seconds=time.perf_counter() - started,
    )


@dataclass
class _Planner:
    """Samples one choice of settings after another."""

    file: str
    limits: Limits
    facts: Facts
    queries: int
    left: float
    speed_of_bfloat16: float
    batch_size: int
    plain_seconds: float
    tell: Callable[[str], None]

    def offers(self, name: str, options: dict[str, Any], remaining: int) -> Iterator[Offer]:
        """The best settings of a method that fit, and of a store of its features."""
        for kind in ("attribute", "index") if _explicit(name, options) else ("attribute",):
            yield self.best(kind, name, options, self.left / remaining)

    def best(self, kind: str, name: str, options: dict[str, Any], seconds: float) -> Offer:
        """The most faithful settings that fit, or the ones that come nearest."""
        offer = self.offer(kind, name, options, seconds)
        if offer.prediction is None:
            return offer
        known = inspect.signature(methods.factory(name)).parameters
        if "dimension" in known and "dimension" not in options:
            offer = self._dimension(offer, seconds, known["dimension"].default)
        bfloat16 = "precision" in known and "precision" not in options
        if "time" in offer.breaks and bfloat16 and self.speed_of_bfloat16 >= FAST:
            faster = {**offer.options, "precision": "bfloat16"}
            offer = _better(offer, self.offer(kind, name, faster, seconds))
        return offer

    def _dimension(self, offer: Offer, seconds: float, default: int | None) -> Offer:
        """The largest dimension that fits; the smallest if none does."""
        whole = DIMENSIONS[-1] + 1  # None stands for gradients as they are
        default = whole if default is None else default
        larger = [d for d in DIMENSIONS if d > default]
        smaller = [d for d in reversed(DIMENSIONS) if d < default]
        for dimension in larger if offer.fits else smaller:
            options = {**offer.options, "dimension": dimension}
            other = self.offer(offer.kind, offer.method, options, seconds)
            if offer.fits and not other.fits:
                return offer
            offer = _better(offer, other) if not offer.fits else other
            if dimension < default and offer.fits:
                return offer
        return offer

    def _first(self, seconds: float) -> int:
        """Examples that a run of ten plain passes gets through in a tenth of the time."""
        count = int(0.01 * seconds / self.plain_seconds) if self.plain_seconds else FIRST[1]
        return max(FIRST[0], min(FIRST[1], count))

    def offer(self, kind: str, name: str, options: dict[str, Any], seconds: float) -> Offer:
        """Sample one choice of settings and predict the whole."""
        self.tell(" ".join([kind, name, *(f"{k}={v}" for k, v in options.items())]))
        seconds = max(seconds, LEAST_SECONDS)
        request = Request(
            self.file,
            kind,
            name,
            options,
            self.queries,
            seconds,
            batch_size=self.batch_size if kind == "index" else BATCH,
            first=self._first(seconds),
        )
        sample = take(request, memory=self.limits.memory, patience=max(2 * seconds, PATIENCE))
        self.left = max(0.0, self.left - sum(p.seconds for p in sample.points))
        offer = Offer(
            kind=kind,
            method=name,
            options=options,
            command=command_of(request),
            refused=sample.refused,
            stopped=sample.stopped,
        )
        if sample.refused is not None:
            return offer
        queries = self.facts.queries if kind == "attribute" else 0
        found = predicted(sample, request, self.facts.examples, queries)
        if found is None:
            return offer
        return replace(
            offer,
            prediction=found,
            breaks=breaks_of(found, self.limits, sample.stopped),
            remedy=remedy_of(found, self.limits, kind, self.facts.examples, queries),
        )


def _batch_size(about: Sample, limits: Limits) -> int:
    """Forebear's own if it is as good as any, otherwise the smallest that is."""
    usable = [b for b in about.batches if b["memory"] <= limits.memory]
    if not usable:
        return BATCH
    best = min(b["seconds"] for b in usable)
    good = [int(b["size"]) for b in usable if b["seconds"] <= NEAR * best]
    return BATCH if BATCH in good else min(good)


def _speed(about: Sample) -> float:
    products = about.products
    return products["float32"] / products["bfloat16"] if products else 1.0


def _explicit(name: str, options: dict[str, Any]) -> bool:
    """Whether the method's features can be stored."""
    try:
        method = methods.get(name, **options)
    except ForebearError:
        return False
    if name == "similarity":
        return method.metric != "distance"
    return getattr(method, "projection", None) is not None


def _better(one: Offer, other: Offer) -> Offer:
    """The one that fits, or takes less time."""
    if other.prediction is None or one.prediction is None:
        return one if one.prediction is not None else other
    if one.fits != other.fits:
        return one if one.fits else other
    shorter = other.prediction.seconds.value < one.prediction.seconds.value
    return other if shorter else one


def _order(offer: Offer) -> tuple[int, float]:
    if offer.prediction is None:
        return (3 if offer.refused else 2), 0.0
    return (0 if offer.fits else 1), offer.prediction.seconds.value
