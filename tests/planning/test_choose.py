"""Settings and limits, with samples that follow a known cost instead of a clock."""

from collections.abc import Callable

import pytest

from forebear.errors import UnknownNameError
from forebear.planning import Limits, Plan, choose, plan_file
from forebear.planning.child import Request
from forebear.planning.cost import Point
from forebear.planning.sample import Sample
from forebear.planning.terms import Facts

FACTS = Facts(examples=100_000, queries=100, parameters=50_000, outputs=9)
SIZES = ((256, 8), (256, 8), (256, 100), (512, 100), (1024, 100), (4096, 100))
LOAD = 2.0

Seconds = Callable[[Request, int, int], float]


def plan(
    monkeypatch: pytest.MonkeyPatch,
    seconds: Seconds,
    method: str | None = "trak",
    *,
    hours: float = 1.0,
    memory: float = 8e9,
    disk: float = 1e12,
    bfloat16: float = 1.0,
    options: dict[str, object] | None = None,
) -> Plan:
    """A plan whose samples take what `seconds` says."""

    def take(request: Request, *, memory: float, patience: float) -> Sample:
        sample = Sample(start=LOAD, loaded_memory=3e8, facts=FACTS, seconds=1.0)
        if request.kind == "survey":
            sample.products = {"float32": bfloat16, "bfloat16": 1.0}
            for size, each in ((64, 2e-5), (256, 1.05e-5), (512, 1e-5), (1024, 1e-5)):
                sample.batches.append({"size": size, "seconds": each, "memory": 3e8 + 1e6 * size})
            return sample
        if request.method == "leave_one_out":
            sample.refused = "it has no recipe"
            return sample
        for n, q in SIZES:
            width = (request.options or {}).get("dimension", 2048)
            held = 3e8 + 1e5 * min(n, 512) + 4 * n * width
            size = 2.0 * n * width if request.kind == "index" else 4.0 * n * q + 1000
            sample.points.append(Point(n, q, seconds(request, n, q), held, size))
        return sample

    monkeypatch.setattr(choose, "take", take)
    limits = Limits(seconds=3600 * hours, memory=memory, disk=disk)
    return plan_file("task.py", limits, method=method, options=options)  # type: ignore[arg-type]


def by_dimension(request: Request, n: int, q: int) -> float:
    return 1.0 + n * 1e-6 * (request.options or {}).get("dimension", 2048)


@pytest.mark.parametrize(
    ("hours", "dimension"),
    [(1.0, 8192), (700 / 3600, 4096), (300 / 3600, None), (150 / 3600, 1024), (70 / 3600, 512)],
)
def test_the_largest_dimension_that_fits_is_chosen(
    monkeypatch: pytest.MonkeyPatch, hours: float, dimension: int | None
) -> None:
    found = plan(monkeypatch, by_dimension, hours=hours)
    attribute = next(offer for offer in found.offers if offer.kind == "attribute")
    assert attribute.fits
    assert attribute.options.get("dimension") == dimension


def test_an_option_that_was_given_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(monkeypatch, by_dimension, options={"dimension": 64})
    assert {offer.options["dimension"] for offer in found.offers} == {64}
    assert all("--option dimension=64" in offer.command for offer in found.offers)


@pytest.mark.parametrize(("gain", "precision"), [(1.0, None), (5.0, "bfloat16")])
def test_bfloat16_is_for_machines_that_have_it_and_budgets_that_need_it(
    monkeypatch: pytest.MonkeyPatch, gain: float, precision: str | None
) -> None:
    def seconds(request: Request, n: int, q: int) -> float:
        fast = (request.options or {}).get("precision") == "bfloat16"
        return n * (0.01 if fast else 0.05)

    tight = plan(monkeypatch, seconds, "graddot", hours=0.5, bfloat16=gain)
    assert tight.offers[0].options.get("precision") == precision
    assert tight.offers[0].fits == (precision is not None)
    ample = plan(monkeypatch, seconds, "graddot", hours=5, bfloat16=gain)
    assert ample.offers[0].options == {}


def test_time_memory_and_disk_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(monkeypatch, lambda r, n, q: 0.5 + 1e-4 * n, "graddot").offers[0]
    assert found.prediction is not None
    assert found.prediction.seconds.value == pytest.approx(LOAD + 0.5 + 10, rel=0.01)
    assert found.prediction.memory.value == pytest.approx(3e8 + 1e5 * 512 + 8192 * 1e5, rel=0.02)
    assert found.prediction.disk.value == pytest.approx(4 * 1e5 * 100 + 1000, rel=0.01)


@pytest.mark.parametrize(
    ("limit", "breaks", "remedy"),
    [
        ({"hours": 5 / 3600}, ("time",), "--budget 13s, or"),
        ({"memory": 6e8}, ("memory",), "--memory 1.2GB, or"),
        ({"disk": 2e7}, ("disk",), "--disk 0.1GB, or"),
    ],
)
def test_what_breaks_a_limit_says_what_would_keep_it(
    monkeypatch: pytest.MonkeyPatch, limit: dict[str, float], breaks: tuple[str], remedy: str
) -> None:
    found = plan(monkeypatch, lambda r, n, q: 0.5 + 1e-4 * n, "graddot", **limit)  # type: ignore[arg-type]
    offer = found.offers[0]
    assert offer.breaks == breaks
    assert offer.remedy.startswith(remedy)
    assert "of the 100,000 examples" in offer.remedy
    assert not found.fitting
    assert found.recommendation.startswith("Nothing fits. Nearest is graddot")
    assert breaks[0] in found.recommendation


def test_the_examples_that_would_fit_do_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    offer = plan(monkeypatch, lambda r, n, q: 0.5 + 1e-4 * n, "graddot", hours=5 / 3600).offers[0]
    count = int(offer.remedy.split("or ")[1].split(" of")[0].replace(",", ""))
    assert LOAD + 0.5 + 1e-4 * count <= 5
    assert LOAD + 0.5 + 1e-4 * (count + 2000) > 5


def test_those_that_fit_come_first_and_refusals_last(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"graddot": 1e-5, "ekfac": 3e-5}

    def seconds(request: Request, n: int, q: int) -> float:
        return n * costs.get(request.method, 1.0)

    found = plan(monkeypatch, seconds, None, hours=0.1)
    names = [offer.method for offer in found.offers]
    assert names[:2] == ["graddot", "ekfac"]
    assert names[-1] == "leave_one_out"
    assert found.offers[-1].refused == "it has no recipe"
    assert [offer.method for offer in found.fitting] == ["graddot", "ekfac"]
    assert "2 of" in found.recommendation


def test_the_batch_size_is_the_usual_one_unless_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert plan(monkeypatch, by_dimension, "graddot").batch_size == 512
    small = plan(monkeypatch, by_dimension, "similarity", memory=3e8 + 3e8)
    assert small.batch_size == 256
    store = next(offer for offer in small.offers if offer.kind == "index")
    assert "--batch-size 256" in store.command


def test_a_store_is_offered_for_methods_that_have_features(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {m: {o.kind for o in plan(monkeypatch, by_dimension, m).offers} for m in ("trak", "cg")}
    assert kinds == {"trak": {"attribute", "index"}, "cg": {"attribute"}}


def test_an_unknown_method_or_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="graddot"):
        plan(monkeypatch, by_dimension, "graddott")
    with pytest.raises(UnknownNameError, match="dimension"):
        plan(monkeypatch, by_dimension, options={"dimensions": 64})


def test_a_store_that_takes_too_long_says_how_many_workers_would_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, object] = {"dimension": 512}
    found = plan(monkeypatch, lambda r, n, q: 1.0 + 1e-3 * n, hours=30 / 3600, options=options)
    store = next(offer for offer in found.offers if offer.kind == "index")
    assert ", or 4 workers on other machines" in store.remedy  # 100 s that grow in 27 s
    attribute = next(offer for offer in found.offers if offer.kind == "attribute")
    assert "workers" not in attribute.remedy
