"""Saved results belong to a loss, layers and checkpoints: others are refused, not mixed."""

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising_cases import LEVELS, case

import forebear as fb
from forebear import methods
from forebear.errors import MismatchError
from forebear.methods.features import build_store
from forebear.methods.influence import Influence
from forebear.methods.settings import settings_of
from forebear.methods.stored import fit_store, load_fitted
from forebear.task import Task
from forebear.training import Recipe
from forebear.types import Scores

TASK, TRAIN, QUERIES = case()
TRAK = fb.TRAK(dimension=12)

OTHERS: dict[str, Any] = {
    "levels": fb.losses.Denoising(levels=(100, 500, 901), draws=2),
    "draws": fb.losses.Denoising(levels=LEVELS, draws=1),
    "prediction": fb.losses.Denoising(prediction="v", levels=LEVELS, draws=2),
    "noise": fb.losses.Denoising(levels=LEVELS, draws=2, noise="shared"),
    "seed": fb.losses.Denoising(levels=LEVELS, draws=2, seed=1),
    "type": lambda model, batch: model(batch["image"], batch["key"]).flatten(1).sum(1),
}


def other(name: str) -> Task:
    """The same model with another loss."""
    return Task(TASK.model, OTHERS[name])


def again() -> Task:
    """The same in other objects."""
    return case()[0]


def edited(path: Path, **without: None) -> None:
    """A file as an earlier version wrote it: without some facts."""
    content = json.loads(path.read_text())
    for name in without:
        content.pop(name)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", OTHERS)
def test_a_fitted_state_is_refused_to_another_loss(name: str, tmp_path: Path) -> None:
    fitted = fb.GradDot().fit(TASK, TRAIN)
    fitted.save(tmp_path)
    with pytest.raises(MismatchError, match=f"loss differs: .*{name}.* fit again"):
        fb.load(tmp_path, other(name), TRAIN)
    scores = fb.load(tmp_path, again(), TRAIN).score(QUERIES)
    assert torch.equal(scores.values, fitted.score(QUERIES).values)


def test_a_fitted_state_answers_any_measurement_and_the_record_has_both(tmp_path: Path) -> None:
    fb.GradDot().fit(TASK, TRAIN).save(tmp_path)
    asked = fb.load(tmp_path, again().asking(OTHERS["type"]), TRAIN).score(QUERIES).provenance
    plain = fb.load(tmp_path, again(), TRAIN).score(QUERIES).provenance
    assert asked.loss == plain.loss == TASK.facts()["loss"]
    assert plain.measure == "minus the loss"
    assert asked.measure["function"] == "<lambda>"


def test_layers_and_checkpoints_belong_to_a_fitted_state(tmp_path: Path) -> None:
    fb.GradDot().fit(TASK, TRAIN).save(tmp_path / "all")
    with pytest.raises(MismatchError, match=r"layers differs: .*first"):
        fb.load(tmp_path / "all", again().select("first"), TRAIN)
    fb.GradDot(layers=("first",)).fit(TASK, TRAIN).save(tmp_path / "own")
    fb.load(tmp_path / "own", again().select("last"), TRAIN)  # the method has layers of its own
    moment = fb.Checkpoint({k: v.clone() for k, v in TASK.model.state_dict().items()}, 0.1)
    one, two = (
        Task(TASK.model, TASK.loss, checkpoints=[replace(moment, learning_rate=rate)])
        for rate in (0.1, 0.2)
    )
    fb.get("tracin").fit(one, TRAIN).save(tmp_path / "moments")
    with pytest.raises(MismatchError, match="checkpoints differs"):
        fb.load(tmp_path / "moments", two, TRAIN)
    fb.GradDot().fit(one, TRAIN).save(tmp_path / "last")
    fb.load(tmp_path / "last", two, TRAIN)  # looks at the model as it is


def test_a_state_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    fb.GradDot().fit(TASK, TRAIN).save(tmp_path)
    edited(tmp_path / "fitted.json", loss=None, layers=None, checkpoints=None)
    fb.load(tmp_path, other("seed"), TRAIN)


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_scores_belongs_to_a_loss(name: str, tmp_path: Path) -> None:
    blocks = fb.GradDot().fit(TASK, TRAIN).score_to(QUERIES, tmp_path)
    with pytest.raises(MismatchError, match=f"loss differs: .*{name}"):
        fb.GradDot().fit(other(name), TRAIN).score_to(QUERIES, tmp_path)
    with pytest.raises(MismatchError, match="measure differs"):
        fb.GradDot().fit(TASK.asking(OTHERS["type"]), TRAIN).score_to(QUERIES, tmp_path)
    with pytest.raises(MismatchError, match="layers differs"):
        fb.GradDot().fit(TASK.select("last"), TRAIN).score_to(QUERIES, tmp_path)
    fb.GradDot().fit(again(), TRAIN).score_to(QUERIES, tmp_path)
    assert blocks.provenance.loss == TASK.facts()["loss"]


def test_an_older_folder_of_scores_is_refused_with_the_reason(tmp_path: Path) -> None:
    fb.GradDot().fit(TASK, TRAIN).score_to(QUERIES, tmp_path)
    edited(tmp_path / "work.json", loss=None)
    with pytest.raises(MismatchError, match="of a version that did not record it; choose another"):
        fb.GradDot().fit(TASK, TRAIN).score_to(QUERIES, tmp_path)


@pytest.mark.parametrize("name", ["prediction", "seed"])
def test_a_store_belongs_to_a_loss(name: str, tmp_path: Path) -> None:
    store = build_store(TRAK, TASK, TRAIN, tmp_path, dtype="float32")
    for wrong in (
        lambda: build_store(TRAK, other(name), TRAIN, tmp_path, dtype="float32"),
        lambda: fit_store(TRAK, other(name), TRAIN, store),
        lambda: load_fitted(store, other(name), QUERIES),
    ):
        with pytest.raises(MismatchError, match=f"loss differs: .*{name}"):
            wrong()
    build_store(TRAK, again(), TRAIN, tmp_path, dtype="float32")
    load_fitted(store, again(), QUERIES)


def test_a_store_of_an_earlier_version_is_searched(tmp_path: Path) -> None:
    build_store(TRAK, TASK, TRAIN, tmp_path, dtype="float32")
    edited(tmp_path / "manifest.json", loss=None)
    load_fitted(fb.Store.open(tmp_path), again(), QUERIES)


def test_scores_say_the_loss_and_older_ones_are_read(tmp_path: Path) -> None:
    scores = fb.GradDot().fit(TASK, TRAIN).score(QUERIES)
    scores.save(tmp_path)
    path = tmp_path / "scores.json"
    about = json.loads(path.read_text())
    assert about["provenance"]["loss"]["levels"] == list(map(float, LEVELS))
    read = Scores.load(tmp_path).provenance
    theirs = fb.GradDot().fit(other("seed"), TRAIN).score(QUERIES).provenance
    with pytest.raises(MismatchError, match=r"loss differs: \{'seed': 0\} against \{'seed': 1\}"):
        read.require_same(theirs, ("loss",))
    del about["provenance"]["loss"], about["provenance"]["measure"]
    path.write_text(json.dumps(about))
    Scores.load(tmp_path).provenance.require_same(theirs, ("loss", "measure"))


def test_scores_of_two_losses_are_combined_and_the_record_says_so() -> None:
    one = fb.GradDot().fit(TASK, TRAIN).score(QUERIES)
    two = fb.GradDot().fit(other("seed"), TRAIN).score(QUERIES)
    about = fb.combine([one, two]).provenance
    assert about.loss is None
    assert [member["loss"]["seed"] for member in about.settings["members"]] == [0, 1]
    assert fb.combine([one, one]).provenance.loss == one.provenance.loss


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_option_of_every_method_is_in_its_record(name: str) -> None:
    try:
        configured = fb.get(name)
    except TypeError:  # it needs to be told how models are trained
        configured = fb.get(name, recipe=RECIPE)
    settings = settings_of(configured)
    assert is_dataclass(configured)
    assert {field.name for field in fields(configured)} <= set(settings)
    json.dumps(settings)


def test_tensors_and_functions_in_options_are_told_apart() -> None:
    first, second = torch.zeros(2000), torch.zeros(2000)
    second[1000] = 1.0
    one, two = (Influence(name="own", damping=lambda d=d: d) for d in (first, second))  # type: ignore[arg-type]
    assert settings_of(one) != settings_of(two)
    assert settings_of(one) == settings_of(replace(one))


RECIPE = Recipe(
    lambda: torch.nn.Linear(2, 2),
    fb.losses.cross_entropy,
    learning_rate=0.1,
    epochs=1,
    batch_size=4,
)
