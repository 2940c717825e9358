import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from forebear.errors import DataError, FormatError, MismatchError, UnknownNameError
from forebear.studies import STUDIES, run
from forebear.studies.base import Finding, Pieces, StudyResult, Table

TABLE = Table(
    "numbers",
    "Numbers",
    ("method", "cosine", "seconds"),
    [("GradDot", 0.12345, 20_000.0), ("EK-FAC", None, 0.0)],
    "A note.",
)


def result(**changes: object) -> StudyResult:
    facts = {
        "name": "final-model",
        "title": "A title",
        "summary": "What was done.",
        "settings": {"seed": 3, "epochs": (1, 2)},
        "tables": [TABLE, Table("long", "All of it", ("a",), [(1,), (2,)], shown=False)],
        "findings": [Finding("It works.", "at least 1", "2", True)],
        "figures": {"plot": "A caption with <angles>."},
    }
    return StudyResult(**{**facts, **changes})


def with_figure(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "plot.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return folder


def test_a_study_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = with_figure(tmp_path / "out")
    written = result()
    written.save(folder)
    read = StudyResult.load(folder)
    assert [list(map(tuple, t.rows)) for t in read.tables] == [list(t.rows) for t in written.tables]
    assert read.findings == written.findings
    assert read.markdown() == written.markdown()


def test_the_folder_is_readable_without_forebear(tmp_path: Path) -> None:
    folder = with_figure(tmp_path / "out")
    result().save(folder)
    assert pq.read_table(folder / "numbers.parquet").to_pydict()["method"] == ["GradDot", "EK-FAC"]
    assert json.loads((folder / "study.json").read_text())["settings"]["seed"] == 3
    text = (folder / "study.md").read_text()
    assert "| GradDot | 0.123 | 2.00e+04 |" in text
    assert "| EK-FAC | – | 0.000 |" in text
    assert "It works. Expected: at least 1. Measured: 2. This holds." in text


def test_the_page_is_one_file_that_escapes_what_it_shows(tmp_path: Path) -> None:
    folder = with_figure(tmp_path / "out")
    page = result(title="<b>bold</b>").save(folder).read_text()
    assert "<b>bold" not in page
    assert "A caption with &lt;angles&gt;." in page
    assert "data:image/svg+xml;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    assert "All of it" not in page


@pytest.mark.parametrize(
    ("holds", "verdict"), [(True, "holds"), (False, "does not hold"), (None, "is not judged")]
)
def test_a_finding_says_whether_it_holds(holds: bool | None, verdict: str) -> None:
    assert Finding("C.", "e", "m", holds).sentence().endswith(f"Measured: m. This {verdict}.")


def test_a_row_of_another_width_is_refused() -> None:
    with pytest.raises(DataError, match="'t' has 1 cells for 2 columns"):
        Table("t", "T", ("a", "b"), [(1,)])


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    folder = with_figure(tmp_path / "out")
    result().save(folder)
    (folder / "numbers.parquet").unlink()
    with pytest.raises(FormatError, match=r"numbers\.parquet does not exist"):
        StudyResult.load(folder)


def test_finished_pieces_are_not_made_again(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"x": torch.arange(3.0)}

    for _ in range(2):
        found = Pieces(tmp_path / "pieces", {"seed": 0, "epochs": (1, 2)}).tensors("one", make)
        assert found["x"].tolist() == [0.0, 1.0, 2.0]
    assert len(made) == 1


def test_pieces_of_other_settings_are_refused(tmp_path: Path) -> None:
    Pieces(tmp_path, {"seed": 0})
    with pytest.raises(MismatchError, match="seed differs"):
        Pieces(tmp_path, {"seed": 1})


def test_unknown_studies_and_options_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'final-model'"):
        run("final_model", tmp_path)
    with pytest.raises(UnknownNameError, match="option of the study final-model"):
        run("final-model", tmp_path, taks="digits")


def test_every_registered_study_is_one_row_with_a_module() -> None:
    from importlib import import_module

    for module in STUDIES.values():
        assert callable(import_module(module).run)
