"""The command line, as a person types it."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from forebear.cli import app
from forebear.errors import DataError
from forebear.run import DatasetFacts, Interval, MethodResult, Run, top_path
from forebear.types import Provenance, Scores

COMMANDS = ["demo", "attribute", "top", "evaluate", "report", "study", "methods", "doctor"]


def forebear(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    """The one sentence that a wrong use gets."""
    result = forebear(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    values = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.25, -4.0]])
    scores = Scores(
        values=values,
        query_ids=np.asarray(["p", "q"]),
        train_ids=np.asarray(["x", "y", "z"]),
        provenance=Provenance(method="ekfac"),
    )
    top_path(folder, "ekfac").parent.mkdir(parents=True)
    scores.top(3).to_parquet(top_path(folder, "ekfac"))
    scores.top(3, opponents=True).to_parquet(top_path(folder, "ekfac", opponents=True))
    Run(
        kind="attribute",
        dataset=DatasetFacts(name="d", train=3, queries=2),
        methods=[
            MethodResult(
                name="ekfac",
                label="EK-FAC",
                coverage=1.0,
                seconds=0.5,
                passes=12.0,
                lds=Interval(mean=0.43, low=0.4, high=0.46),
            )
        ],
    ).save(folder)
    return folder


def test_help_lists_every_command_and_each_has_help() -> None:
    text = forebear("--help").stdout
    assert "Trace what a model did back to the training data" in text
    for command in COMMANDS:
        assert f" {command} " in text
        page = forebear(command, "--help")
        assert page.exit_code == 0
        assert f"forebear {command}" in page.stdout
    assert forebear().stdout.strip() == text.strip()


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; from forebear.cli import app; code = app(['--help'], standalone_mode=False);"
        "sys.exit(bool({'torch', 'numpy', 'pyarrow', 'jinja2'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "forebear", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("forebear ")


def test_top_prints_proponents_in_order(run_folder: Path) -> None:
    lines = forebear("top", str(run_folder), "--query", "q", "--k", "2").stdout.splitlines()
    assert lines[0] == "EK-FAC: strongest proponents of query q"
    rows = [line.split() for line in lines if line.split()[:1] in (["1"], ["2"], ["3"])]
    assert rows == [["1", "x", "+3"], ["2", "y", "+0.25"]]


def test_top_prints_opponents_and_texts(run_folder: Path) -> None:
    texts = {"train": {"z": "A sentence [bold]."}, "queries": {"q": "A question."}}
    (run_folder / "examples.json").write_text(json.dumps(texts))
    text = forebear("top", str(run_folder), "--query", "q", "--k", "1", "--opponents").stdout
    assert "opponents of query q (A question.)" in text
    assert "A sentence [bold]." in text
    assert "-4" in text


def test_top_without_a_query_shows_all_of_a_few(run_folder: Path) -> None:
    text = forebear("top", str(run_folder), "--k", "3").stdout
    assert "of query p" in text
    assert "of query q" in text


def test_top_names_what_is_wrong(run_folder: Path) -> None:
    folder = str(run_folder)
    assert "unknown query 'r'" in refused("top", folder, "--query", "r", "--k", "1")
    assert "did you mean 'ekfac'" in refused("top", folder, "--method", "ekfak")
    assert "kept 3 examples a query: choose 1 to 3" in refused("top", folder)
    assert "--k" in refused("top", folder, "--k", "0")
    assert "not a run folder" in refused("top", str(run_folder.parent))


def test_report_writes_the_page_and_says_where(run_folder: Path) -> None:
    result = forebear("report", str(run_folder))
    assert result.stdout.strip() == str(run_folder / "report.html")
    assert "EK-FAC" in (run_folder / "report.html").read_text()


def test_doctor_names_a_remedy_for_everything_missing() -> None:
    facts = json.loads(forebear("doctor", "--json").stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["machine"]["threads"] == torch.get_num_threads()
    for part in facts["optional"]:
        assert part["found"] or "install" in part["remedy"]
    text = forebear("doctor").stdout
    assert torch.__version__ in text
    assert "Fashion-MNIST" in text


def test_wrong_use_is_one_sentence(tmp_path: Path) -> None:
    assert "did you mean 'attribute'" in refused("atribute").lower()
    assert "--query" in refused("top", "x", "--qery", "3")
    assert "RUN" in refused("top")
    assert "does not exist" in refused("attribute", "no.py", "--method", "a", "--out", "b")
    file = tmp_path / "task.py"
    file.write_text("")
    arguments = ["attribute", str(file), "--method", "ekfac", "--out", str(tmp_path / "out")]
    assert "is not KEY=VALUE" in refused(*arguments, "--option", "damping")
    assert "given twice" in refused(*arguments, "--option", "a=1", "--option", "a=2")


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: object) -> None:
    made = types.ModuleType(module)
    vars(made).update(functions)
    monkeypatch.setitem(sys.modules, module, made)


def test_attribute_passes_settings_with_their_types(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple] = []

    def attribute(*arguments: object) -> Run:
        seen.append(arguments)
        return Run(kind="attribute")

    stand_in(monkeypatch, "forebear.attribution", attribute_from_file=attribute)
    file, out = tmp_path / "task.py", tmp_path / "out"
    file.write_text("")
    options = ["damping=0.1", "exact=true", "layers=[1, 2]", "mode=a=b"]
    arguments = [word for option in options for word in ("--option", option)]
    result = forebear("attribute", str(file), "-m", "ekfac", "--out", str(out), *arguments)
    assert result.exit_code == 0
    settings = {"damping": 0.1, "exact": True, "layers": [1, 2], "mode": "a=b"}
    assert seen == [(file, {"ekfac": settings}, out)]


def test_demo_and_evaluate_print_the_table_of_the_run(
    monkeypatch: pytest.MonkeyPatch, run_folder: Path
) -> None:
    calls: list[dict] = []
    stand_in(monkeypatch, "forebear.demo", run=lambda **options: calls.append(options))
    stand_in(monkeypatch, "forebear.pipeline", evaluate_run=lambda *a: None)
    text = forebear("demo", "--out", str(run_folder), "--seed", "3").stdout
    assert calls == [{"out": run_folder, "data": "digits", "seed": 3, "threads": None}]
    for part in ("EK-FAC", "12×", "0.43", "0.40 to 0.46"):
        assert part in text
    assert "0.40 to 0.46" in forebear("evaluate", str(run_folder)).stdout


def test_study_prints_tables_and_findings_in_sentences(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from forebear.studies.base import Finding, StudyResult, Table

    calls: list[tuple] = []

    def run(name: str, out: Path, **options: object) -> StudyResult:
        calls.append((name, out, options))
        return StudyResult(
            name=name,
            title="A study",
            settings={},
            tables=[
                Table("a", "Shown", ("method", "cosine"), [("GradDot", 0.5)], "How to read it."),
                Table("b", "Only written", ("x",), [(1,)], shown=False),
            ],
            findings=[Finding("Water is wet.", "wet", "damp", False)],
        )

    stand_in(monkeypatch, "forebear.studies", run=run)
    text = forebear("study", "final-model", "--task", "digits", "--quick", "--threads", "1").stdout
    options = {"quick": True, "seed": 0, "threads": 1, "task": "digits"}
    assert calls == [("final-model", Path("runs/study-final-model-digits"), options)]
    for part in ("A study", "Shown", "GradDot", "0.500", "How to read it."):
        assert part in text
    assert "Only written" not in text
    assert "Water is wet. Expected: wet. Measured: damp. This does not hold." in text
    forebear("study", "removal", "--out", str(tmp_path), "--seed", "3")
    assert calls[1] == ("removal", tmp_path, {"quick": False, "seed": 3, "threads": None})


def test_a_study_gives_work_to_an_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    from forebear.executors.processes import Processes
    from forebear.studies import StudyResult

    given: list[object] = []

    def run(name: str, out: Path, *, executor: object, **_: object) -> StudyResult:
        given.append(executor)
        return StudyResult(name=name, title="A study", settings={})

    stand_in(monkeypatch, "forebear.studies", run=run)
    forebear("study", "diffusion", "--executor", "processes:3")
    assert given == [Processes(workers=3)]


def test_an_unknown_study_is_refused() -> None:
    assert "did you mean 'hessians'" in refused("study", "hessian")


def test_a_study_says_which_executors_it_has_no_use_for() -> None:
    assert "one process that gives out work" in refused(
        "study", "diffusion", "--executor", "torchrun"
    )
    text = refused("study", "removal", "--executor", "processes:2")
    assert "option of the study removal" in text
    assert "'executor'" in text


def test_an_error_has_a_traceback_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**_: object) -> None:
        raise DataError("row 3 has\n 4 columns")

    stand_in(monkeypatch, "forebear.demo", run=run)
    assert refused("demo") == "error: row 3 has 4 columns"
    monkeypatch.setenv("FOREBEAR_DEBUG", "1")
    assert isinstance(forebear("demo").exception, DataError)


def test_a_bug_is_not_dressed_up_as_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**_: object) -> None:
        raise ZeroDivisionError

    stand_in(monkeypatch, "forebear.demo", run=run)
    assert isinstance(forebear("demo").exception, ZeroDivisionError)


def test_ctrl_c_says_that_the_same_command_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**_: object) -> None:
        raise KeyboardInterrupt

    stand_in(monkeypatch, "forebear.demo", run=run)
    result = forebear("demo")
    assert result.exit_code == 130
    assert "the same command resumes" in result.stderr
    assert "Traceback" not in result.stderr


def test_methods_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "name": "ekfac",
        "family": "influence",
        "needs": "gradients",
        "cost": "two passes",
        "modalities": ["any"],
        "paper": "Grosse et al. 2023",
    }
    stand_in(monkeypatch, "forebear.methods", table=lambda: [row])
    text = forebear("methods").stdout
    for part in ("ekfac", "influence", "two passes", "Grosse et al. 2023"):
        assert part in text
    assert json.loads(forebear("methods", "--json").stdout) == [row]


@pytest.mark.skipif(os.name != "posix", reason="permissions as on POSIX")
def test_a_folder_that_cannot_be_written_is_one_sentence(run_folder: Path) -> None:
    (run_folder / "report.html.partial").mkdir()
    assert "report.html.partial" in refused("report", str(run_folder))
