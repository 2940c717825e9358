"""The study of diffusion models on a few digits: its numbers, its folder, and going on with it."""

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr

from forebear.errors import MismatchError, NumericalWarning, TaskError, UnknownNameError
from forebear.executors.processes import Processes
from forebear.studies import StudyResult, diffusion, jobs
from forebear.studies.diffusion import (
    entrants,
    judging,
    likeness,
    models,
    removal,
    subjects,
)
from forebear.studies.diffusion.findings import (
    _better_together,
    _controls,
    _few_levels,
    _late,
    _pooled,
    _simple,
)
from forebear.studies.diffusion.subjects import Quality, Removal, Subject
from forebear.tasks.schedules import Discrete
from forebear.training import GroundTruth
from forebear.training.recipe import Recipe
from forebear.zoo import digits_diffusion
from forebear.zoo.pictures import half_subsets

FEW = (
    "random",
    "pixels",
    "pixels_cosine",
    "embedding",
    "softmax",
    "graddot",
    "dtrak",
    "nda",
    "abu_step",
)


def tiny(quick: bool, seed: int) -> Subject:
    pictures = digits_diffusion.load(train=40, queries=4)
    return Subject(
        name="tiny",
        title="a few digits",
        pictures=pictures,
        recipe=digits_diffusion.recipe("epsilon", epochs=3),
        loss=digits_diffusion.loss("epsilon", levels=2),
        quality=Quality(digits_diffusion.loss("epsilon", levels=3), "minus the loss"),
        sampler=replace(digits_diffusion.sampler("epsilon"), steps=3),
        subsets=half_subsets(40, 6),
        seeds=2,
        generated=5,
        removal=Removal(2, 2, 4, 4, methods=("pixels", "graddot")),
        seed=seed,
        few=2,
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny(patch)
        return folder, diffusion.run(folder, task="tiny")


def use_tiny(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(subjects.SUBJECTS, "tiny", tiny)
    some = tuple(entrant for entrant in entrants.ENTRANTS if entrant.key in FEW)
    patch.setattr(diffusion, "ENTRANTS", some)
    patch.setattr(models, "TOGETHER", 4)


def test_lds_is_that_of_sums_over_the_halves(study: tuple[Path, StudyResult]) -> None:
    folder, _ = study
    truth = tiny(False, 0)
    pieces = sorted((folder / "pieces").glob("truth-*.safetensors"))
    assert len(pieces) == 4  # two seeds, and four networks at a time
    outcomes = torch.cat([load_file(path)["outcomes"] for path in pieces])
    mean = outcomes.view(2, 6, -1).mean(0).numpy()  # [m, q]
    image = truth.pictures.train.batch(slice(None))["image"].flatten(1).double().numpy()
    query = truth.pictures.queries.batch(slice(None))["image"].flatten(1).double().numpy()
    rows = pq.read_table(folder / "per_query.parquet").to_pylist()
    for q in range(4):
        closeness = -np.sqrt(((image - query[q]) ** 2).sum(1))
        sums = [closeness[mask.numpy()].sum() for mask in truth.subsets]
        expected = spearmanr(sums, mean[:, q])[0]
        found = [
            row["lds"]
            for row in rows
            if (row["method"], row["queries"], row["query"]) == ("pixels", "validation", q)
        ]
        assert found == [pytest.approx(expected)]


def test_the_folder_is_whole(study: tuple[Path, StudyResult]) -> None:
    folder, result = study
    names = {table.name for table in result.tables}
    parts = {"ridges", "removal", "pooled", "cost", "per_query", "time", "unlearning"}
    assert {"lds", "ceiling", *parts} == names
    for name in (*result.figures, "report"):
        assert (folder / (f"{name}.svg" if name in result.figures else "report.html")).is_file()
    again = StudyResult.load(folder)
    assert [finding.claim for finding in again.findings] == [f.claim for f in result.findings]
    table = next(table for table in result.tables if table.name == "lds")
    assert [row[0] for row in table.rows][-1] == "Ridge datamodel (oracle)"


def test_it_goes_on_where_it_was(
    study: tuple[Path, StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = study
    use_tiny(monkeypatch)

    def no_training(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Recipe, "train_many", no_training)
    again = diffusion.run(folder, task="tiny")
    same = {"lds", "pooled", "removal", "ridges", "cost"}
    for one, other in zip(result.tables, again.tables, strict=True):
        if one.name in same:
            assert one.texts() == other.texts()
    with pytest.raises(MismatchError, match="seed differs"):
        diffusion.run(folder, task="tiny", seed=1)


def test_time_is_that_of_all_pieces_whichever_run_made_them(
    study: tuple[Path, StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = study
    use_tiny(monkeypatch)
    again = diffusion.run(folder, task="tiny")
    tables = [next(t for t in each.tables if t.name == "time") for each in (result, again)]
    assert [row[0] for row in tables[0].rows][:4] == list(jobs.PARTS)
    for one, other in zip(*(table.rows[:4] for table in tables), strict=True):
        assert one == other
        assert one[1] > 0  # type: ignore[operator]
    seconds = [row[2] for row in tables[1].rows]
    assert sum(seconds[:5]) == pytest.approx(seconds[5], abs=0.3)  # type: ignore[arg-type]


def test_a_stopped_piece_is_made_again_and_counted_once(tmp_path: Path) -> None:
    made = []

    def make() -> jobs.Found:
        made.append(1)
        if len(made) == 1:
            raise KeyboardInterrupt
        sum(range(10**6))
        return {"x": torch.ones(2)}, {"warnings": ["w"]}

    job = jobs.Job("scoring", "one", make)
    with pytest.raises(KeyboardInterrupt):
        jobs.TimedPieces(tmp_path, {}).read(job)
    first, third = (jobs.TimedPieces(tmp_path, {}) for _ in range(2))
    first.make([job], "pieces")
    tensors, known = third.read(job)
    assert (len(made), tensors["x"].tolist(), known["warnings"]) == (2, [1, 1], ["w"])
    assert known["seconds"] == first.made["one"] == third.seconds("scoring") > 0
    assert not third.made


def test_a_method_that_refuses_says_why_and_one_that_warns_is_heard() -> None:
    def refuse() -> jobs.Found:
        raise TaskError("not this task")

    def warn() -> jobs.Found:
        warnings.warn("careful", NumericalWarning, stacklevel=1)
        return {"x": torch.ones(1)}, {"steps": 3}

    assert jobs.heard(refuse) == ({}, {"refused": "not this task"})
    assert jobs.refusal([jobs.heard(warn), jobs.heard(refuse)]) == "not this task"
    assert jobs.refusal([jobs.heard(warn)]) is None
    assert jobs.heard(warn)[1] == {"steps": 3, "warnings": ["careful"]}


def test_numbers_are_the_same_in_other_processes(
    study: tuple[Path, StudyResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = study
    use_tiny(monkeypatch)
    subject = tiny(False, 0)
    spread = jobs.TimedPieces(tmp_path / "pieces", subject.facts(), Processes(workers=2))
    diffusion.measure(models.train(subject, spread), spread)
    files = sorted(path.name for path in (folder / "pieces").glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "pieces").glob("*.safetensors")) == files
    for name in files:
        if name != "plain-pass.safetensors":
            one, other = (load_file(each / "pieces" / name) for each in (folder, tmp_path))
            for key, tensor in one.items():
                torch.testing.assert_close(other[key], tensor, rtol=1e-4, atol=1e-5)
    # Only training and drawing are done by the process that gives out the work.
    assert set(spread.made) == {"model", "generated"}


def test_entrants_with_other_options_have_other_pieces() -> None:
    seen = [str(entrant.settings) for entrant in entrants.ENTRANTS]
    assert len(set(seen)) == len(seen)
    assert not any("0x" in one for one in seen)  # no addresses: names last over runs


def test_unknown_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="digits-eps"):
        diffusion.run(tmp_path, task="digits-ep")


def test_removals_leave_out_the_strongest() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 5.0, 1.0]])
    lists = removal.strongest(scores, 2)
    assert lists.tolist() == [[1, 3], [2, 3]]
    assert removal.without(lists, 4).tolist() == [True, False, False, False]
    assert removal.overlap(lists) == 0.5


def test_the_datamodel_is_a_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    subsets = half_subsets(20, 9)
    outcomes = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    rows = subsets.double().numpy() - subsets.double().numpy().mean(0)
    wanted = outcomes.numpy() - outcomes.numpy().mean(0)
    ridge = 0.3 * np.trace(rows @ rows.T) / 9
    primal = np.linalg.solve(rows.T @ rows + ridge * np.eye(20), rows.T @ wanted)
    found = likeness.datamodel(subsets, outcomes, 0.3)
    np.testing.assert_allclose(found.numpy(), primal.T, atol=1e-12)


def test_softmax_weights_are_those_of_the_noisy_image() -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.rand(5, 1, 2, 2, generator=generator)
    query = train[3:4] + 0.01
    schedule = Discrete.linear()
    weights = likeness.whole_image_softmax(query, train, torch.tensor([77]), schedule, 20)
    assert weights.sum().item() == pytest.approx(1)
    assert weights.argmax().item() == 3
    other = likeness.whole_image_softmax(query, train, torch.tensor([78]), schedule, 20)
    assert not torch.equal(weights, other)


def test_negated_scores_negate_the_lds() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = GroundTruth(
        subsets=half_subsets(30, 12),
        outcomes=torch.randn(2, 12, 4, generator=generator),
        seeds=(0, 1),
        train="",
        queries="",
    )
    scores, rows = torch.randn(3, 30, generator=generator), torch.tensor([0, 1, 3])
    one, other = judging.judge(scores, truth, rows), judging.judge(-scores, truth, rows)
    np.testing.assert_allclose(one.values, -other.values, atol=1e-12)
    assert one.error == pytest.approx(other.error)
    assert 0.05 < one.error < 0.6  # about 1 / √12 a query, and three queries


def test_quality_is_minus_the_loss() -> None:
    loss = digits_diffusion.loss("x0", levels=3, draws=2)
    torch.manual_seed(0)
    model = digits_diffusion.build_clean()
    batch = digits_diffusion.load(train=5, queries=2).train.batch(slice(None))
    with torch.no_grad():
        torch.testing.assert_close(Quality(loss, "")(model, batch), -loss(model, batch))


def test_the_noise_bank_keeps_the_noisy_end() -> None:
    schedule = digits_diffusion.loss("x0").schedule
    bank = subjects.noise_bank(schedule)  # type: ignore[arg-type]
    assert len(bank) == 100
    assert bank[-1] == pytest.approx(20.0)
    assert bank[0] == pytest.approx(schedule.levels(142)[42])


class Told:
    """What findings look at, made up."""

    def __init__(self, values: dict[str, tuple[list[float], list[float]]], few: int = 4) -> None:
        self.groups = {"validation": slice(0, few), "generated": slice(few, 2 * few)}
        self.values = values
        self.judged = {key: dict.fromkeys(self.groups) for key in values}
        self.trained = SimpleNamespace(subject=SimpleNamespace(name="told", groups=self.groups))
        self.rows = {key: torch.arange(2 * few) for key in values}
        self.scores: dict[str, torch.Tensor] = {}
        self.removals: dict[str, removal.Removals] = {}

    def fixed(self, key: str, group: str) -> judging.Judgement:
        each = self.values[key][list(self.groups).index(group)]
        return judging.Judgement(np.array(each), 0.1)


@pytest.mark.parametrize(("late", "holds"), [(0.24, True), (0.26, False)])
def test_nda_with_much_noise_is_held_against_nda(late: float, holds: bool) -> None:
    told: Any = Told({"nda": ([0.4] * 4, [0.1] * 4), "nda_late": ([late] * 4, [0.1] * 4)})
    assert _late(told).holds is holds  # type: ignore[union-attr]


@pytest.mark.parametrize(("both", "holds"), [(0.61, True), (0.59, False)])
def test_an_ensemble_is_held_against_its_best_member(both: float, holds: bool) -> None:
    values = {"mucs+das:z": both, "mucs": 0.5, "das": 0.6}
    told: Any = Told({key: ([value] * 4, [value] * 4) for key, value in values.items()})
    # A member that was asked about more queries is compared on those of the ensemble.
    told.rows |= {key: torch.tensor([0, 1, 4, 5]) for key in ("mucs+das:z", "mucs")}
    for key in ("mucs+das:z", "mucs"):
        told.values[key] = (told.values[key][0][:2], told.values[key][1][:2])
    told.values["das"] = ([0.6, 0.6, 9.0, 9.0], [0.6, 0.6, 9.0, 9.0])
    found = _better_together(told)
    assert found is not None
    assert found.holds is holds
    assert "DAS, squared 0.600" in found.measured
    told.values["mucs+das:z"] = ([0.7, 0.52], [0.7, 0.52])
    again = _better_together(told)
    assert again is not None
    assert again.holds is None  # the interval of the gain holds zero


def test_few_levels_are_held_against_many() -> None:
    told: Any = Told({"mucs": ([0.5] * 4, [0.5] * 4), "mucs_100": ([0.5] * 4, [0.5] * 4)})
    scores = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0))
    told.scores = {"mucs": scores, "mucs_100": scores.exp()}
    assert _few_levels(told).holds is True  # type: ignore[union-attr]
    told.scores["mucs_100"] = scores.flip(2)
    assert _few_levels(told).holds is False  # type: ignore[union-attr]


@pytest.mark.parametrize(("aside", "holds"), [(1.0, True), (2.5, False)])
def test_controls_are_held_against_targets(aside: float, holds: bool) -> None:
    told: Any = Told({"das": ([0.5] * 4, [0.5] * 4)})
    moved = removal.Changes(np.full(9, 2.0), np.full(9, aside), 30, 0.1)
    chance = removal.Changes(np.full(9, 0.5), np.full(9, 0.5), 30)
    told.removals = {"pixel distance": removal.Removals({}, {"das": moved}, {"das": chance}, {})}
    assert _pooled(told).holds is True
    found = _controls(told)
    assert found.holds is holds
    assert f"{aside / 0.5:.2f} times random" in found.measured


def test_an_image_is_held_against_its_own_random_removal() -> None:
    """Targets that move easily by themselves are not what a method aimed at."""
    easy = np.linspace(1, 3, 9)
    moved, chance = (removal.Changes(easy + more, np.full(9, more), 30) for more in (0.5, 0.0))
    shifts = removal.Removals({}, {"das": moved}, {"das": chance}, {})
    assert shifts.aim("das").p > 0.3
    assert shifts.aim("das").mean == pytest.approx(0.5)


def test_the_best_method_is_compared_on_its_own_queries() -> None:
    values = {key: ([0.3] * 4, [0.3] * 4) for key in ("pixels", "pixels_cosine", "embedding")}
    told: Any = Told({**values, "abu_step": ([0.5] * 2, [0.5] * 2)})
    told.rows["abu_step"] = torch.tensor([0, 1, 4, 5])
    told.values["pixels"] = ([0.6, 0.6, 0.1, 0.1], [0.2, 0.2, 0.9, 0.9])
    found = _simple(told)
    assert found is not None
    assert found.holds is False
    assert "validation: AbU+, one step 0.500, Pixel distance 0.600" in found.measured
    assert "generated: AbU+, one step 0.500, Pixel cosine 0.300" in found.measured
