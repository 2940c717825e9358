"""Tasks, methods, truth and run folders joined, in Python and as a person types it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import forebear as fb
from forebear.cli import app
from forebear.data import Data
from forebear.pipeline import attribute_file, evaluate_run
from forebear.record import plain_pass_seconds
from forebear.run import Run, read_texts, read_top, scores_folder
from forebear.training import half_subsets

LOSS = fb.losses.cross_entropy

FILE = '''
"""What is attributed: two clouds of points and a small network."""
import torch
from torch import nn
import forebear as fb


def points(count, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    return torch.randn(count, 3, generator=generator) + y[:, None], y


def task():
    torch.manual_seed({seed})
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return fb.Task(model.eval(), fb.losses.cross_entropy)


def train():
    return points({train}, 1)


def queries():
    return points(4, 2)
'''

TEXTS = """

def examples():
    return {"train": {0: "the first point", 1: "another"}, "queries": {3: "the last question"}}
"""

BAGS = """
import torch
from torch import nn
import forebear as fb


def padded(bags):
    longest = max(map(len, bags))
    rows = [torch.cat([bag, bag.new_zeros(longest - len(bag))]) for bag in bags]
    return {"x": torch.stack(rows)}


def task():
    def loss(model, batch):
        return model(batch["x"].sum(1, keepdim=True))[:, 0]

    return fb.Task(nn.Linear(1, 1, bias=False), loss, collate=padded)


def train():
    return [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0])]


def queries():
    return fb.Data([torch.tensor([2.0]), torch.tensor([2.0, 3.0])], ids=["a", "b"])
"""


def written(folder: Path, name: str = "points.py", *, seed: int = 0, train: int = 20) -> Path:
    path = folder / name
    path.write_text(FILE.replace("{seed}", str(seed)).replace("{train}", str(train)))
    return path


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    return torch.randn(count, 3, generator=generator) + y[:, None], y


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


RECIPE = fb.Recipe(build, LOSS, learning_rate=0.3, epochs=3, batch_size=10)
TRAIN, QUERIES = points(20, 1), points(4, 2)


def truth_of(model: nn.Module, seeds: int = 2, **changes: Any) -> fb.GroundTruth:
    settings: dict[str, Any] = {"subsets": half_subsets(20, 12, seed=0), "full": False}
    return fb.GroundTruth.collect(
        RECIPE, TRAIN, QUERIES, seeds=seeds, model=model, **settings | changes
    )


def test_attribute_is_fit_and_score() -> None:
    task = fb.Task(RECIPE.train(TRAIN), LOSS)
    scores = fb.attribute(task, TRAIN, QUERIES, "exact", damping=0.5, curvature="fisher")
    method = fb.Exact(damping=0.5, curvature="fisher")
    assert torch.equal(scores.values, method.fit(task, TRAIN).score(QUERIES).values)
    assert fb.attribute(task, TRAIN, QUERIES).provenance.method == "ekfac"


def test_lds_is_the_rank_correlation_of_summed_scores_with_outcomes() -> None:
    model = RECIPE.train(TRAIN)
    scores = fb.attribute(fb.Task(model, LOSS), TRAIN, QUERIES, "graddot")
    truth = truth_of(model)
    found = fb.evaluate(scores, truth)
    expected = []
    for q in range(4):
        sums = [scores.values[q, mask].sum().item() for mask in truth.subsets]
        means = [truth.outcomes[:, m, q].mean().item() for m in range(len(truth.subsets))]
        expected.append(spearmanr(sums, means).statistic)
    np.testing.assert_allclose(found["per_query"], expected, atol=1e-12)
    lds = found["lds"]
    assert lds.mean == pytest.approx(np.mean(expected))
    assert lds.low < lds.mean < lds.high
    assert found["ceiling"].low <= found["ceiling"].high
    assert "ceiling" not in fb.evaluate(scores, truth_of(model, seeds=1))


def test_truth_of_other_things_is_refused() -> None:
    model = RECIPE.train(TRAIN)
    task, truth = fb.Task(model, LOSS), truth_of(model)
    with pytest.raises(fb.errors.MismatchError, match="another training set"):
        fb.evaluate(fb.attribute(task, points(20, 9), QUERIES, "graddot"), truth)
    with pytest.raises(fb.errors.MismatchError, match="another set of queries"):
        fb.evaluate(fb.attribute(task, TRAIN, points(4, 9), "graddot"), truth)
    other = fb.Task(RECIPE.train(TRAIN, seed=5), LOSS)
    with pytest.raises(fb.errors.MismatchError, match="another model"):
        fb.evaluate(fb.attribute(other, TRAIN, QUERIES, "graddot"), truth)


def test_a_plain_pass_takes_time_and_leaves_no_trace() -> None:
    model = build().train()
    assert plain_pass_seconds(fb.Task(model, LOSS), Data(TRAIN)) > 0
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_attribute_file_writes_a_folder_that_other_tools_can_read(tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "run"
    path.write_text(path.read_text() + TEXTS)
    run = attribute_file(path, "graddot", {}, out)
    assert Run.load(out) == run
    assert run.kind == "attribute"
    assert run.best == "graddot"
    assert run.dataset is not None
    assert (run.dataset.name, run.dataset.train, run.dataset.queries) == ("points", 20, 4)
    assert run.model is not None
    assert run.model.parameters == 26
    values = load_file(out / "scores" / "graddot" / "scores.safetensors")["values"]
    assert values.shape == (4, 20)
    for name, pick in (("graddot", "max"), ("graddot-opponents", "min")):
        table = pq.read_table(out / "top" / f"{name}.parquet").to_pydict()
        assert len(table["score"]) == 4 * 20
        first = [s for s, rank in zip(table["score"], table["rank"], strict=True) if rank == 1]
        extremes = getattr(values, f"a{pick}")(1).double().tolist()
        assert first == pytest.approx(extremes)
    assert np.load(out / "self_influence" / "graddot.npy").shape == (20,)
    assert read_texts(out)["train"] == {"0": "the first point", "1": "another"}
    assert read_texts(out)["queries"] == {"3": "the last question"}


def test_a_second_method_joins_the_run_and_a_repeated_one_replaces_itself(tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "run"
    for method, options in (("graddot", {}), ("ekfac", {}), ("ekfac", {"damping": 0.5})):
        run = attribute_file(path, method, options, out)
    assert [result.name for result in run.methods] == ["graddot", "ekfac"]
    assert run.methods[1].settings["damping"] == 0.5
    assert run.best == "ekfac"


def test_another_model_or_data_set_is_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "run"
    attribute_file(written(tmp_path), "graddot", {}, out)
    with pytest.raises(fb.errors.MismatchError, match="run of another model"):
        attribute_file(written(tmp_path, seed=1), "graddot", {}, out)
    with pytest.raises(fb.errors.MismatchError, match="run of another training set"):
        attribute_file(written(tmp_path, train=21), "graddot", {}, out)
    path = written(tmp_path)
    path.write_text(path.read_text().replace("points(4, 2)", "points(4, 3)"))
    with pytest.raises(fb.errors.MismatchError, match="run of another set of queries"):
        attribute_file(path, "graddot", {}, out)
    assert [result.name for result in Run.load(out).methods] == ["graddot"]


def test_a_file_may_import_its_neighbours_and_define_dataclasses(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "neighbour_of_points.py").write_text("SCALE = 2.0\n")
    text = "from __future__ import annotations\nimport dataclasses\n"
    text += "from neighbour_of_points import SCALE\n"
    text += "@dataclasses.dataclass\nclass Settings:\n    scale: float = SCALE\n"
    path.write_text(text + path.read_text())
    before = list(sys.path)
    assert attribute_file(path, "random", {}, tmp_path / "run").best == "random"
    assert sys.path == before


def test_sequences_of_different_lengths_are_collated_as_the_task_says(tmp_path: Path) -> None:
    path = tmp_path / "bags.py"
    path.write_text(BAGS)
    attribute_file(path, "graddot", {}, tmp_path / "run")
    scores = fb.Scores.load(scores_folder(tmp_path / "run", "graddot"))
    assert scores.query_ids.tolist() == ["a", "b"]
    # The gradient of a bag is its sum, so that scores are products of sums.
    assert scores.values.tolist() == [[6.0, 12.0, 2.0], [15.0, 30.0, 5.0]]


def test_a_file_without_the_three_functions_says_which(tmp_path: Path) -> None:
    path = tmp_path / "points.py"
    path.write_text("def train():\n    return []\n")
    with pytest.raises(fb.errors.FormatError, match=r"does not define task\(\), queries\(\)"):
        attribute_file(path, "graddot", {}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    path = tmp_path / "points.txt"
    path.write_text("")
    with pytest.raises(fb.errors.FormatError, match="not a Python file"):
        attribute_file(path, "graddot", {}, tmp_path / "run")


def test_an_unknown_method_is_refused_before_the_file_runs(tmp_path: Path) -> None:
    path = tmp_path / "points.py"
    path.write_text("raise RuntimeError('this ran')\n")
    with pytest.raises(fb.errors.UnknownNameError, match="did you mean 'graddot'"):
        attribute_file(path, "gradot", {}, tmp_path / "run")


def saved_truth(path: Path, folder: Path) -> fb.GroundTruth:
    """Truth for the model and data of a written file."""
    content: dict[str, Any] = {}
    exec(path.read_text(), content)
    task = content["task"]()
    truth = fb.GroundTruth.collect(
        RECIPE,
        content["train"](),
        content["queries"](),
        subsets=half_subsets(20, 8, seed=0),
        seeds=2,
        model=task.model,
        full=False,
    )
    truth.save(folder)
    return truth


def test_evaluate_run_writes_what_it_found(tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "run"
    for method in ("random", "graddot"):
        attribute_file(path, method, {}, out)
    with pytest.raises(fb.errors.FormatError, match="holds no ground truth"):
        evaluate_run(out)
    truth = saved_truth(path, out / "truth")
    run = evaluate_run(out)
    assert Run.load(out) == run
    for result in run.methods:
        found = fb.evaluate(fb.Scores.load(scores_folder(out, result.name)), truth)
        assert result.lds == found["lds"]
    assert run.truth is not None
    assert (run.truth.subsets, run.truth.seeds, run.truth.fraction) == (8, 2, 0.5)
    best = max(run.methods, key=lambda result: result.lds.mean if result.lds else -1)
    assert run.best == best.name


def test_load_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    task = fb.Task(RECIPE.train(TRAIN), LOSS)
    with pytest.raises(fb.errors.FormatError, match="does not exist"):
        fb.load(tmp_path / "nowhere", task, TRAIN)
    fb.EKFAC().fit(task, TRAIN).save(tmp_path)
    assert fb.load(tmp_path, task, TRAIN, method=fb.EKFAC()).method == fb.EKFAC()
    with pytest.raises(fb.errors.MismatchError, match="settings"):
        fb.load(tmp_path, task, TRAIN, method=fb.EKFAC(damping=0.3))
    weights = tmp_path / "fitted.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(fb.errors.FormatError, match=r"fitted\.safetensors is damaged"):
        fb.load(tmp_path, task, TRAIN)
    weights.unlink()
    with pytest.raises(fb.errors.FormatError, match=r"fitted\.safetensors"):
        fb.load(tmp_path, task, TRAIN)
    weights.write_bytes(whole)
    about = tmp_path / "fitted.json"
    facts = json.loads(about.read_text())
    about.write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(fb.errors.FormatError, match="upgrade forebear"):
        fb.load(tmp_path, task, TRAIN)
    settings = {**facts["settings"], "curvature": {"type": "Unheard"}}
    about.write_text(json.dumps({**facts, "settings": settings}))
    with pytest.raises(fb.errors.FormatError, match="'Unheard'"):
        fb.load(tmp_path, task, TRAIN)
    about.write_text(json.dumps({key: facts[key] for key in facts if key != "train_ids"}))
    with pytest.raises(fb.errors.FormatError, match="it lacks train_ids"):
        fb.load(tmp_path, task, TRAIN)
    about.write_text("{")
    with pytest.raises(fb.errors.FormatError, match="is damaged"):
        fb.load(tmp_path, task, TRAIN)


def forebear(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_from_a_file_to_a_page(tmp_path: Path) -> None:
    path, out = written(tmp_path), tmp_path / "run"
    path.write_text(path.read_text() + TEXTS)
    first = forebear("attribute", path, "--method", "graddot", "--out", out)
    assert first.exit_code == 0, first.output
    assert f"wrote {out}" in first.stdout
    second = forebear("attribute", path, "-m", "exact", "--out", out, "--option", "damping=0.3")
    assert second.exit_code == 0, second.output
    assert Run.load(out).method("exact").settings["damping"] == 0.3
    top = forebear("top", out, "--query", 3, "--k", 2)
    assert top.exit_code == 0, top.output
    assert "Exact influence: strongest proponents of query 3 (the last question)" in top.stdout
    saved_truth(path, out / "truth")
    evaluated = forebear("evaluate", out)
    assert evaluated.exit_code == 0, evaluated.output
    assert "noise ceiling of LDS" in evaluated.stdout
    report = forebear("report", out)
    assert report.exit_code == 0, report.output
    page = (out / "report.html").read_text()
    assert "GradDot" in page
    assert "the last question" in page


def test_every_method_is_listed() -> None:
    listed = json.loads(forebear("methods", "--json").stdout)
    assert [row["name"] for row in listed] == [row["name"] for row in fb.methods()]
    table = forebear("methods").stdout
    assert all(row["name"] in table for row in listed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "ekfak"), "unknown method 'ekfak': did you mean 'ekfac'?"),
        (("-m", "ekfac", "--option", "dampin=1"), "option of ekfac 'dampin': did you mean"),
        (("-m", "ekfac", "--option", "damping=-1"), "it must be finite and not negative"),
        (("-m", "exact", "--option", 'layers=["9"]'), "unknown layer '9'"),
    ],
)
def test_wrong_use_is_one_sentence(tmp_path: Path, arguments: tuple, message: str) -> None:
    path, out = written(tmp_path), tmp_path / "run"
    result = forebear("attribute", path, "--out", out, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


EXAMPLES = Path(__file__).parents[1] / "examples"
IMAGES = ("generated_digit", "generated_shapes")
"""Tested with less training, in `test_attribution.py`."""

TASKS = [
    path
    for path in sorted(EXAMPLES.glob("*.py"))
    if "__main__" not in path.read_text() and path.stem not in IMAGES
]


def test_the_script_for_tables_runs_by_itself() -> None:
    pytest.importorskip("pandas")
    path = EXAMPLES / "scikit_learn.py"
    answer = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert len(answer.stdout.splitlines()) > 10


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_the_examples_run_as_written_and_twice_the_same(path: Path, tmp_path: Path) -> None:
    if path.stem == "language":
        pytest.importorskip("transformers")
    attribute_file(path, "ekfac", {}, tmp_path)
    run = attribute_file(path, "graddot", {}, tmp_path)  # refused if it were another model
    assert [result.coverage for result in run.methods] == [1.0, 1.0]


def test_the_language_example_finds_the_line_it_asks_about(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    attribute_file(EXAMPLES / "language.py", "ekfac", {}, tmp_path)
    texts = read_texts(tmp_path)
    tops = read_top(tmp_path, "ekfac").by_query()
    first = {texts["queries"][q]: texts["train"][str(rows[0][0])] for q, rows in tops.items()}
    assert first["Beautiful is better than … ugly"] == "Beautiful is better than ugly."
    assert first["Now is better than … never"] == "Now is better than never."
