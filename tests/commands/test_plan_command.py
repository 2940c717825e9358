"""`forebear plan`, as a person types it, with samples that follow a known cost."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from forebear.cli import app
from forebear.planning import choose
from forebear.planning.child import Request
from forebear.planning.cost import Point
from forebear.planning.sample import Sample
from forebear.planning.terms import Facts


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def take(request: Request, *, memory: float, patience: float) -> Sample:
        sample = Sample(start=1.0, facts=Facts(10_000, 100, 5_000))
        if request.method == "leave_one_out":
            sample.refused = "it has no recipe"
        elif request.kind != "survey":
            for n in (256, 256, 512, 1024):
                sample.points.append(Point(n, 100, 0.01 * n, 4e8, 1e3 * n))
        return sample

    monkeypatch.setattr(choose, "take", take)
    path = tmp_path / "mine.py"
    path.write_text("")
    return path


def forebear(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_what_fits_is_printed_with_a_command_to_copy(file: Path) -> None:
    result = forebear(file, "--budget", "1h", "--memory", "8GB", "--method", "graddot")
    assert result.exit_code == 0
    assert "10,000 examples, 100 queries" in result.stdout
    assert "1 of 1 methods fit; the cheapest is graddot (1 min 41 s" in result.stdout
    assert f"forebear attribute {file} --method graddot --out runs/mine-graddot" in result.stdout


def test_where_nothing_fits_it_says_so_and_what_would(file: Path) -> None:
    result = forebear(file, "--budget", "50.5s", "--method", "graddot")
    assert result.exit_code == 0
    assert "Nothing fits" in result.stdout
    assert "--budget 101s, or 4,900 of the 10,000 examples" in result.stdout
    assert "forebear attribute" not in result.stdout


def test_a_method_that_cannot_be_used_says_why(file: Path) -> None:
    result = forebear(file, "--budget", "1h", "--method", "leave_one_out")
    assert "leave_one_out cannot be used: it has no recipe" in result.stdout


def test_json_says_whether_anything_fits(file: Path) -> None:
    answers = {}
    for budget in ("50s", "1h"):
        result = forebear(file, "--budget", budget, "--method", "graddot", "--json")
        answers[budget] = json.loads(result.stdout)
    assert not answers["50s"]["fits"]
    assert answers["1h"]["fits"]
    (offer,) = answers["1h"]["offers"]
    assert offer["prediction"]["seconds"]["value"] == pytest.approx(101, rel=0.02)
    assert offer["prediction"]["disk"]["value"] == pytest.approx(1e7, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "soon"], "'soon' is not a time"),
        (["--budget", "1h", "--memory", "lots"], "'lots' is not a size"),
        (["--budget", "1h", "--option", "damping=1"], "name it with --method"),
        (["--budget", "1h", "--method", "gradot"], "did you mean 'graddot'"),
    ],
)
def test_wrong_use_is_one_sentence(file: Path, arguments: list[str], said: str) -> None:
    result = forebear(file, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""
