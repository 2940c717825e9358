"""The demo, made tiny: what it leaves, that it resumes, and what it refuses."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import forebear as fb
from forebear import demo, zoo
from forebear.demo import Entry
from forebear.run import Run, read_data, read_self_influence, scores_folder, top_path
from forebear.training import Recipe
from forebear.types import Scores
from forebear.zoo import digits

ENTRIES = (
    Entry("random", {}, "the floor"),
    Entry("similarity", {}),
    Entry("graddot", {}),
    Entry("tracin", {}),
    Entry("trak", {"dimension": 16}),
    Entry("exact", {"curvature": "fisher"}),
)
TRAIN, QUERIES = 80, 6


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SUBSETS": 8,
        "SEEDS": {"digits": 2, "fashion-mnist": 2},
        "CHECKPOINTS": 2,
        "MODELS_OF_TRAK": 2,
        "REMOVED": (0.1, 0.3),
        "ENTRIES": ENTRIES,
    }.items():
        monkeypatch.setattr(demo, name, value)
    few = ModuleType("few_digits")
    vars(few).update(
        load=lambda seed: digits.load(train=TRAIN, queries=QUERIES, seed=seed),
        recipe=lambda: digits.recipe(epochs=3),
    )
    monkeypatch.setattr(zoo, "get", lambda name: few)


def outcome(folder: Path) -> tuple[Run, dict[str, Scores], fb.GroundTruth]:
    run = Run.load(folder)
    scores = {r.name: Scores.load(scores_folder(folder, r.name)) for r in run.methods}
    return run, scores, fb.GroundTruth.load(folder / "truth")


def test_the_folder_has_all_that_the_page_and_other_tools_need(tmp_path: Path) -> None:
    run = demo.run(out=tmp_path)
    assert Run.load(tmp_path) == run
    names = [entry.name for entry in ENTRIES]
    assert [result.name for result in run.methods] == names
    assert (run.kind, run.best in names) == ("demo", True)
    assert run.dataset is not None
    assert (run.dataset.train, run.dataset.queries) == (TRAIN, QUERIES)
    assert run.dataset.image_shape == [8, 8]
    assert run.label_errors is not None
    assert run.label_errors.flipped == 4  # 5 % of 80
    assert run.truth is not None
    assert (run.truth.subsets, run.truth.seeds, run.truth.fraction) == (8, 2, 0.5)
    assert run.truth.ceiling is not None
    assert run.removal is not None
    assert run.removal.fractions == [0.0, 0.1, 0.3]
    assert {"random", "graddot", "similarity", run.best} == set(run.removal.curves)
    assert all(len(curve) == 3 for curve in run.removal.curves.values())
    assert run.methods[0].note == "the floor"
    for result in run.methods:
        assert result.lds is not None
        assert result.lds.low <= result.lds.mean <= result.lds.high
        assert 0 <= result.label_error_auc <= 1  # type: ignore[operator]
        assert 0 <= result.found_in_first_10_percent <= 1  # type: ignore[operator]
        assert result.seconds is not None
        assert result.passes is not None
        assert result.coverage == (None if result.name in ("random", "similarity") else
                                   pytest.approx(demo_coverage(result.name)))  # fmt: skip
        for opponents in (False, True):
            table = pq.read_table(top_path(tmp_path, result.name, opponents=opponents))
            assert table.num_rows == QUERIES * 50
        assert read_self_influence(tmp_path, result.name).shape == (TRAIN,)  # type: ignore[union-attr]
    data = read_data(tmp_path)
    wrong = data["train_labels"] != data["train_given_labels"]
    assert (wrong == data["flipped"]).all()
    assert wrong.sum() == 4
    page = (tmp_path / "report.html").read_text()
    assert "GradDot" in page
    assert "data:image/png;base64" in page


def demo_coverage(name: str) -> float:
    """Exact influence sees the last two layers of 64-64-32-10, the others all of it."""
    last = 64 * 32 + 32 + 32 * 10 + 10
    return last / (64 * 64 + 64 + last) if name == "exact" else 1.0


def test_labels_are_judged_as_they_were_flipped(tmp_path: Path) -> None:
    run = demo.run(out=tmp_path)
    flipped = read_data(tmp_path)["flipped"].astype(bool)
    for result in run.methods:
        suspicion = read_self_influence(tmp_path, result.name)
        assert suspicion is not None
        wins = np.sign(suspicion[flipped][:, None] - suspicion[~flipped][None])
        assert result.label_error_auc == pytest.approx((1 + wins.mean()) / 2)
        # With ties the best case bounds what is found in the first eight of eighty.
        at_most = (np.argsort(np.argsort(-suspicion, kind="stable"))[flipped] < 8).mean()
        if len(set(suspicion)) == len(suspicion):
            assert result.found_in_first_10_percent == pytest.approx(at_most)


def counted(monkeypatch: pytest.MonkeyPatch, stop_at: tuple[str, int] | None = None) -> Counter:
    """Count the work that is done; the n-th call of one kind is interrupted as by Ctrl-C."""
    calls: Counter = Counter()

    def watch(owner: Any, attribute: str, label: Callable[..., str]) -> None:
        original = getattr(owner, attribute)

        def watched(*args: Any, **kwargs: Any) -> Any:
            name = label(*args, **kwargs)
            calls[name] += 1
            if stop_at == (name, calls[name]):
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, watched)

    watch(Recipe, "train_with_checkpoints", lambda *_, **__: "train")
    watch(Recipe, "train_many", lambda *_, **__: "several models")
    watch(demo, "run_method", lambda configured, *_, **__: configured.name)
    watch(fb.GroundTruth, "collect", lambda *_, **__: "truth")
    watch(demo, "removal_outcomes", lambda *_, **__: "removal")
    return calls


DONE_ONCE = {"train": 1, "truth": 1} | {entry.name: 1 for entry in ENTRIES}


@pytest.mark.parametrize(
    "stop_at", [("train", 1), ("graddot", 1), ("truth", 1), ("removal", 2)], ids=lambda s: s[0]
)
def test_an_interrupted_demo_resumes_without_doing_anything_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: tuple[str, int]
) -> None:
    demo.run(out=tmp_path / "whole")
    with monkeypatch.context() as patched:
        before = counted(patched, stop_at)
        with pytest.raises(KeyboardInterrupt):
            demo.run(out=tmp_path / "halves")
    assert not (tmp_path / "halves" / "run.json").exists()
    with monkeypatch.context() as patched:
        after = counted(patched)
        demo.run(out=tmp_path / "halves")
    for stage, times in DONE_ONCE.items():
        finished = before[stage] - (stage == stop_at[0])
        assert finished + after[stage] == times
    run, scores, truth = outcome(tmp_path / "halves")
    expected_run, expected_scores, expected_truth = outcome(tmp_path / "whole")
    for name, expected in expected_scores.items():
        assert torch.equal(scores[name].values, expected.values)
        assert scores[name].provenance == expected.provenance
    assert torch.equal(truth.outcomes, expected_truth.outcomes)
    assert torch.equal(truth.subsets, expected_truth.subsets)
    assert run.removal == expected_run.removal
    assert [r.lds for r in run.methods] == [r.lds for r in expected_run.methods]


def test_a_finished_demo_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo.run(out=tmp_path)
    calls = counted(monkeypatch)
    demo.run(out=tmp_path)
    assert calls == Counter()


@pytest.mark.parametrize(
    ("settings", "constants", "message"),
    [
        ({"seed": 1}, {}, "holds a demo with seed 0, this one has 1"),
        ({"data": "fashion-mnist"}, {}, "with data 'digits', this one has 'fashion-mnist'"),
        ({}, {"SUBSETS": 6}, "with subsets 8, this one has 6"),
    ],
)
def test_a_folder_of_another_demo_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    constants: dict[str, Any],
    message: str,
) -> None:
    with monkeypatch.context() as patched:
        counted(patched, ("train", 1))
        with pytest.raises(KeyboardInterrupt):
            demo.run(out=tmp_path)
    for name, value in constants.items():
        monkeypatch.setattr(demo, name, value)
    with pytest.raises(fb.errors.MismatchError, match=message):
        demo.run(out=tmp_path, **settings)


def test_a_folder_of_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    Run(kind="attribute").save(tmp_path)
    with pytest.raises(fb.errors.MismatchError, match="holds another run"):
        demo.run(out=tmp_path)
    assert Run.load(tmp_path).kind == "attribute"


def test_an_unknown_data_set_comes_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(fb.errors.UnknownNameError, match="did you mean 'digits'"):
        demo.run(out=tmp_path / "run", data="digit")
    assert not (tmp_path / "run").exists()
