"""From a sample to the whole: time, memory and disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forebear.planning.child import Request
from forebear.planning.cost import Cost, Estimate, Point, extrapolate
from forebear.planning.sample import Sample
from forebear.planning.terms import PASSES, Facts
from forebear.stream import BATCH

NOISE = 0.015
"""Growth of memory below this share of it is taken for chance, unless it is known to be there."""


FEW_PAIRS = 8
"""With so many times more parameters than examples, a matrix of examples takes next to nothing."""


@dataclass(frozen=True)
class Prediction:
    """What the whole will take.

    Attributes:
        seconds: wall-clock time of the command, from its start to its end.
        processor: seconds of all processors.
        memory: highest resident bytes.
        disk: bytes written.
        fixed_seconds: part of `seconds` that samples paid once: loading, and the first run.
        sampled: examples of the largest sample.
        at_least: whether the sample did not end, so that all of this is less than what it takes.
    """

    seconds: Estimate
    processor: Estimate
    memory: Estimate
    disk: Estimate
    fixed_seconds: float
    sampled: int
    at_least: bool
    time_cost: Cost
    memory_cost: Cost
    disk_cost: Cost

    @property
    def seconds_per_example(self) -> float:
        """Time that one more example takes."""
        return self.time_cost.at(2, 0) - self.time_cost.at(1, 0)


def predicted(sample: Sample, request: Request, examples: int, queries: int) -> Prediction | None:
    """What a sample says about all examples; None where it says nothing.

    Args:
        sample: points with growing numbers of examples, the first two alike.
        request: that it answers.
        examples: of the whole.
        queries: of the whole.
    """
    if sample.facts is None:
        return None
    points = sample.points[1:] or sample.points
    if not points:
        return _bound(sample, request.seconds) if sample.stopped else None
    warm = max(0.0, sample.points[0].seconds - points[0].seconds)
    fixed = sample.start + warm
    spent = sample.loaded_processor + max(0.0, sample.points[0].processor - points[0].processor)
    terms = sample.terms

    def whole(values: Callable[[Point], float], terms: Sequence[str]) -> tuple[Cost, Estimate]:
        if len({p.examples for p in points}) == 1 and points[0].examples < examples:
            terms = [term for term in terms if term != "1"]  # one size: all of it may grow
        return extrapolate(points, [values(p) for p in points], terms, examples, queries)

    time_cost, seconds = whole(lambda p: p.seconds, terms)
    _, processor = whole(lambda p: p.processor, terms)
    disk_cost, disk = whole(lambda p: p.disk, PASSES)
    # Beyond the examples of a batch memory stays what it is.
    batch = request.batch_size
    if batch == BATCH and sample.facts.step is not None:
        batch = sample.facts.step
    memory_cost, memory = extrapolate(
        points,
        [p.memory for p in points],
        _memory_terms(points, terms, batch, sample.facts),
        examples,
        queries,
        batch=batch,
    )
    enough = sample.loaded_memory
    return Prediction(
        seconds=_shifted(seconds, fixed),
        processor=_shifted(processor, spent),
        memory=Estimate(*(max(enough, m) for m in (memory.value, memory.low, memory.high))),
        disk=disk,
        fixed_seconds=fixed,
        sampled=max(p.examples for p in points),
        at_least=False,
        time_cost=time_cost,
        memory_cost=memory_cost,
        disk_cost=disk_cost,
    )


def _memory_terms(
    points: Sequence[Point], terms: Sequence[str], batch: int, facts: Facts
) -> tuple[str, ...]:
    """Terms of memory: a batch, and what is kept of every example if the samples show it."""
    if "n3" in terms:
        # Gradients of all examples are kept. Samples smaller than a batch cannot tell these from
        # what a batch takes, and to run out of memory is worse than to have some left.
        many = facts.parameters < FEW_PAIRS * facts.examples
        return ("1", "nq", "n", "n2") if many else ("1", "nq", "n")
    beyond = [p for p in points if p.examples >= batch]
    if len({p.examples for p in beyond}) < 2:
        # What a batch takes cannot be told from what is kept of every example: that it is a batch
        # is the better guess.
        return ("1", "nq", "batch")
    flat = Cost.fitted(beyond, [p.memory for p in beyond], ("1", "nq"))
    misses = [abs(flat.at(p.examples, p.queries) / p.memory - 1) for p in beyond]
    if max(misses) < NOISE:
        return ("1", "nq", "batch")
    return ("1", "nq", "batch", "n") if terms == PASSES else ("1", "nq", "batch", "n", "n2")


def _bound(sample: Sample, given: float) -> Prediction:
    """All that is known of a sample that never came to an end: it takes longer."""
    assert isinstance(sample.facts, Facts)
    seconds = sample.start + given
    nothing = Cost({})
    return Prediction(
        seconds=Estimate(seconds, seconds, float("inf")),
        processor=Estimate(given, given, float("inf")),
        memory=Estimate(sample.loaded_memory, sample.loaded_memory, float("inf")),
        disk=Estimate(0.0, 0.0, float("inf")),
        fixed_seconds=seconds,
        sampled=0,
        at_least=True,
        time_cost=nothing,
        memory_cost=nothing,
        disk_cost=nothing,
    )


def _shifted(estimate: Estimate, by: float) -> Estimate:
    return Estimate(estimate.value + by, estimate.low + by, estimate.high + by)
