"""The study of concepts: its claims on made-up numbers, and one run on a few pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch

from forebear.studies import diffusion
from forebear.studies.diffusion import concepts as study
from forebear.studies.diffusion import customised
from forebear.studies.diffusion.steps import steps_bring_nearer
from forebear.task import Task
from forebear.zoo import concepts as zoo

FEW = ("pixels", "trak", "whole", "slider_trak", "slider")


def test_precision_counts_the_concept_of_the_query() -> None:
    data = zoo.load(train=60, each=1, pairs=2)
    same = data.query_labels[:, 1, None] == data.labels[None, :, 1]
    perfect = zoo.precision(data, same.float(), 1)
    np.testing.assert_allclose(perfect, np.minimum(same.sum(1).numpy(), 10) / 10)
    whole = same.float() + (data.query_labels[:, 0, None] == data.labels[None, :, 0]).float()
    both = study.both(data, whole.expand(2, -1, -1))
    assert both[data.withheld.numpy()].max() <= 0.5  # no picture has both


def test_the_slider_is_held_against_whole_images() -> None:
    withheld = np.array([True, True, False])
    values = {"trak": 0.4, "whole": 0.45, "slider_trak": 0.7, "slider": 0.75}
    found = {key: np.array([[value, value, 1.0]] * 2) for key, value in values.items()}
    compared = study.Compared(found, {}, nearer=np.array([0.88, 0.96]), changed=2e-6)
    verdicts = [finding.holds for finding in study.findings(compared, withheld)]
    assert verdicts == [True, False, True, True, False, True]


def test_a_step_up_the_loss_is_told_from_a_step_down() -> None:
    data = zoo.load(train=60, each=1, pairs=0)
    model = zoo.recipe(epochs=20).train(data.train)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert steps_bring_nearer(model, zoo.loss(), data, count=4) >= 0.9
    assert steps_bring_nearer(model, zoo.loss(), data, count=4, length=-1e-2) <= 0.1
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-6)


def test_a_global_question_is_asked_once_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    data = zoo.load(train=60, each=2, pairs=1)
    trained = study.Trained(Task(zoo.recipe(epochs=1).train(data.train), zoo.loss()), data, 9)
    row = next(row for row in study.ROWS if row.key == "slider_trak")
    scores = row.rank(trained)
    assert scores.shape == (2, 4, 60)
    assert torch.equal(scores[:, 0], scores[:, 1])
    assert not torch.equal(scores[:, 0], scores[:, 2])


@pytest.mark.parametrize("task", ["concepts", "customised"])
def test_the_folder_is_whole(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, few in ((study, FEW), (customised, ("pixels", "slider"))):
        monkeypatch.setattr(module, "ROWS", tuple(r for r in module.ROWS if r.key in few))
    result = diffusion.run(tmp_path, task=task, quick=True)
    table = result.tables[0]
    assert str(table.rows[0][0]).lower() == "pixel distance"
    assert len(table.rows) == (5 if task == "concepts" else 2)
    assert len(result.tables) == 1  # nothing was skipped
    for name in result.figures:
        assert (tmp_path / f"{name}.svg").is_file()
    assert (tmp_path / "report.html").is_file()
    again = diffusion.run(tmp_path, task=task, quick=True)
    numbers = slice(2, 5) if task == "concepts" else slice(1, 3)
    for one, other in zip(table.rows, again.tables[0].rows, strict=True):
        assert one[numbers] == other[numbers]
