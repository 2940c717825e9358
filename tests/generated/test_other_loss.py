"""A page of generated images is of one loss: others are refused, and nothing stale comes back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generated_cases import Small

import forebear as fb
from forebear.errors import MismatchError
from forebear.run import Run
from forebear.task import Task
from forebear.tasks.diffusion import Denoising
from forebear.tasks.schedules import Continuous
from forebear.training.recipe import Recipe
from forebear.types import Scores


def attributed(small: Small, out: Path, *, task: Task | None = None, **more: Any) -> Run:
    """A quick page."""
    methods = more.pop("methods", ("graddot",))
    return fb.attribute_images(
        task or small.task, small.train, small.generated, methods=methods, out=out, **more
    )


@pytest.mark.parametrize(
    ("changes", "what"), [({"levels": 2}, "levels"), ({"seed": 5}, "seed"), ({"draws": 2}, "draws")]
)
def test_another_loss_is_refused(
    small: Small, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    attributed(small, tmp_path)
    wrong = Denoising(Continuous(0.7, most=20.0), "x0", **{"levels": 3, **changes})
    with pytest.raises(MismatchError, match=f"another loss .*{what}.* delete the folder"):
        attributed(small, tmp_path, task=Task(small.task.model, wrong))
    with pytest.raises(MismatchError, match="another measurement"):
        attributed(small, tmp_path, task=small.task.asking(wrong))


def test_other_layers_are_scored_anew_and_the_same_are_kept(small: Small, tmp_path: Path) -> None:
    first = attributed(small, tmp_path).method("graddot").seconds
    values = Scores.load(tmp_path / "scores/graddot").values
    assert attributed(small, tmp_path).method("graddot").seconds == first
    same = Denoising(Continuous(0.7, most=20.0), "x0", levels=3)
    kept = attributed(small, tmp_path, task=Task(small.task.model, same))
    assert kept.method("graddot").seconds == first
    layer = next(name for name, _ in small.task.model.named_children())
    attributed(small, tmp_path, task=small.task.select(layer))
    assert not torch.equal(Scores.load(tmp_path / "scores/graddot").values, values)


def test_the_record_and_the_page_say_the_loss(small: Small, tmp_path: Path) -> None:
    run = attributed(small, tmp_path)
    assert run.model is not None
    assert run.model.loss["prediction"] == "x0"
    assert run.model.measure == "minus the loss"
    assert "loss denoising: prediction x0" in (tmp_path / "report.html").read_text()
    assert Scores.load(tmp_path / "scores/graddot").provenance.loss == run.model.loss


def test_a_folder_of_an_earlier_version_is_refused_with_the_reason(
    small: Small, tmp_path: Path
) -> None:
    attributed(small, tmp_path)
    path = tmp_path / "run.json"
    content = json.loads(path.read_text())
    del content["model"]["loss"], content["model"]["measure"]
    path.write_text(json.dumps(content))
    Run.load(tmp_path)
    with pytest.raises(MismatchError, match="version that did not record the loss"):
        attributed(small, tmp_path)


def test_counterfactuals_of_other_losses_and_samplers_have_other_facts(small: Small) -> None:
    def recipe(**settings: Any) -> Recipe:
        loss = Denoising(Continuous(0.7, most=20.0), "x0", levels=3)
        return small.recipe.with_settings(loss=loss.training(**settings))

    def constant(value: float) -> Any:
        return lambda model, batch: batch["image"] * value

    one = fb.Counterfactual(recipe(), constant(0.0))
    assert one.facts() == fb.Counterfactual(recipe(), constant(0.0)).facts()
    assert one.facts() != fb.Counterfactual(recipe(spread=1.0), constant(0.0)).facts()
    assert one.facts() != fb.Counterfactual(recipe(), constant(1.0)).facts()
    assert one.facts() != fb.Counterfactual(recipe(), replace(small.sampler, steps=7)).facts()
