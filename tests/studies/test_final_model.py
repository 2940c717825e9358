"""The study on a network so small that all of it takes seconds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.spatial.distance import cosine
from scipy.stats import spearmanr

from forebear.errors import FormatError, MismatchError, UnknownNameError
from forebear.studies import StudyResult, final_model
from forebear.studies.final_model import Outcome, agreement, entrants
from forebear.studies.final_model.findings import findings

FILE = """
import torch
from torch import nn

import forebear as fb

generator = torch.Generator().manual_seed(0)
X = torch.randn(60, 3, generator=generator, dtype=torch.float64)
Y = torch.tanh(X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)) + 0.1 * X[:, 0] ** 2


def task():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    recipe = fb.Recipe(
        lambda: model, fb.losses.squared_error, learning_rate=0.1, epochs=30, batch_size=16
    )
    return fb.Task(recipe.train((X[:40], Y[:40])), fb.losses.squared_error)


def train():
    return X[:40], Y[:40]


def queries():
    return X[40:], Y[40:]


def further_training():
    return fb.FurtherTraining(
        learning_rate=0.05, batch_size=16, amounts=(1, 2, 20), seeds=2, max_seeds=None
    )
"""

FEW = ("horizon", "filter", "graddot", "gradcos", "gn_100", "gn_large", "random")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    folder = tmp_path_factory.mktemp("study")
    file = folder / "mine.py"
    file.write_text(FILE)
    with pytest.MonkeyPatch.context() as patch:
        few = tuple(e for e in entrants.ENTRANTS if e.key in FEW)
        patch.setattr(final_model, "ENTRANTS", few)
        patch.setattr(final_model, "SWEEP", np.array([0.01, 1.0, 100.0]))
        return folder, final_model.run(folder / "out", task=str(file), quick=True)


def test_the_folder_holds_tables_figures_and_a_page(study: tuple[Path, StudyResult]) -> None:
    out = study[0] / "out"
    for name in ("study.json", "study.md", "report.html", "agreement.png", "agreement.svg"):
        assert (out / name).stat().st_size > 0
    rows = pq.read_table(out / "per_query.parquet").to_pydict()
    assert len(rows["cosine"]) == len(FEW) * 3 * 20
    assert StudyResult.load(out).findings == study[1].findings


def test_small_steps_from_a_smooth_model_are_foreseen(study: tuple[Path, StudyResult]) -> None:
    rows = pq.read_table(study[0] / "out" / "per_query.parquet").to_pandas()
    mean = rows.groupby(["method", "epochs"])["centred cosine"].mean()
    assert mean["graddot", 1] > 0.95
    assert mean["filter", 20] > 0.9
    assert mean["filter", 20] > mean["graddot", 20]
    assert abs(mean["random", 1]) < 0.3


def test_the_tables_have_a_line_for_every_method(study: tuple[Path, StudyResult]) -> None:
    tables = {table.name: table for table in study[1].tables}
    assert {"cosine", "centred_cosine", "spearman", "gold", "cost"} <= set(tables)
    assert len(tables["cosine"].rows) == len(FEW)
    assert all(row[2] > 0.9 for row in tables["gold"].rows)
    notes = {row[0]: row[2] for row in tables["cost"].rows}
    assert notes["TracIn"] == "takes no part: it needs checkpoints with learning rates"


def test_the_same_command_does_nothing_again(
    study: tuple[Path, StudyResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tuple(e for e in entrants.ENTRANTS if e.key in FEW)
    monkeypatch.setattr(final_model, "ENTRANTS", few)
    monkeypatch.setattr(final_model, "SWEEP", np.array([0.01, 1.0, 100.0]))

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(entrants.Field, "scores", never)
    again = final_model.run(study[0] / "out", task=str(study[0] / "mine.py"), quick=True)
    assert [t.name for t in again.tables] == [t.name for t in study[1].tables]


def test_a_folder_of_other_work_is_refused(study: tuple[Path, StudyResult]) -> None:
    with pytest.raises(MismatchError, match="left out differs"):
        final_model.run(study[0] / "out", task=str(study[0] / "mine.py"), quick=True, seed=1)


def test_wrong_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'digits'"):
        final_model.run(tmp_path, task="digit")
    with pytest.raises(FormatError, match="does not exist"):
        final_model.run(tmp_path, task="no.py")
    file = tmp_path / "task.py"
    file.write_text(FILE.replace("further_training", "other"))
    with pytest.raises(FormatError, match=r"does not define further_training\(\)"):
        final_model.run(tmp_path / "out", task=str(file))


def test_agreement_is_cosine_centred_cosine_and_rank_correlation() -> None:
    rng = np.random.default_rng(0)
    scores, gold = rng.normal(1, 1, (2, 3, 7)), rng.normal(0, 1, (2, 3, 7))
    found = agreement(scores, gold)
    for a in range(2):
        for q in range(3):
            s, g = scores[a, q], gold[a, q]
            assert found[0, a, q] == pytest.approx(1 - cosine(s, g))
            assert found[1, a, q] == pytest.approx(np.corrcoef(s, g)[0, 1])
            assert found[2, a, q] == pytest.approx(spearmanr(s, g).statistic)


def test_a_query_without_effects_counts_as_missing() -> None:
    gold = np.random.default_rng(0).normal(size=(1, 2, 5))
    gold[0, 1] = 0
    assert np.isnan(agreement(gold, gold)[0, 0, 1])
    assert agreement(gold, gold)[0, 0, 0] == pytest.approx(1)


def outcome(**means: list[float]) -> Outcome:
    """Made up: methods with these cosines after 1, 5 and 20 epochs, all queries alike."""
    values = {key: np.tile(np.array(m)[None, :, None], (3, 1, 4)) for key, m in means.items()}
    rng = np.random.default_rng(0)
    same = rng.normal(size=(3, 4, 9))
    return Outcome(
        epochs=(1, 5, 20),
        horizons=(1.0, 5.0, 20.0),
        values=values,
        scores=dict.fromkeys(means, same),
        seconds=dict.fromkeys(means, 0.1),
        skipped={},
        warned={},
        reliability=(0.99, 0.99, 0.99),
        seeds=3,
        single=np.array(means["graddot"]),
        sweep=None,
        mean_square=1.0,
    )


GOOD = {
    "graddot": [0.97, 0.8, 0.5],
    "gn_100": [0.7, 0.85, 0.9],
    "horizon": [0.975, 0.95, 0.93],
    "gradcos": [0.4, 0.4, 0.3],
}


def holding(made: Outcome) -> dict[str, bool | None]:
    return {finding.claim: finding.holds for finding in findings(made, activation="tanh")}


def test_claims_hold_where_they_should() -> None:
    judged = holding(outcome(**GOOD))
    assert len(judged) >= 6
    assert all(judged.values())


@pytest.mark.parametrize(
    ("key", "means", "about"),
    [
        ("graddot", [0.90, 0.8, 0.5], "GradDot is right for little"),
        ("graddot", [0.97, 0.9, 0.8], "GradDot is right for little"),
        ("gn_100", [0.96, 0.96, 0.96], "With one fixed damping"),
        ("horizon", [0.97, 0.85, 0.95], "stays right"),
        ("horizon", [0.97, 0.95, 0.4], "From epoch 2 on"),
        ("gradcos", [0.6, 0.4, 0.3], "GradCos and TRAK"),
    ],
)
def test_claims_fail_where_the_numbers_say_so(key: str, means: list[float], about: str) -> None:
    judged = holding(outcome(**{**GOOD, key: means}))
    (claim,) = [text for text in judged if about in text]
    assert judged[claim] is False


def test_an_unreliable_gold_standard_is_said() -> None:
    made = replace(outcome(**GOOD), reliability=(0.99, 0.8, 0.99))
    assert [f.holds for f in findings(made, activation="tanh") if "reliable gold" in f.claim] == [
        False
    ]


def test_every_entrant_has_a_name_of_its_own() -> None:
    keys = [entrant.key for entrant in entrants.ENTRANTS]
    assert len(set(keys)) == len(keys)
