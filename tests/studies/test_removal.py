"""The removal study on a reduced grid: exponents inside the published intervals, and its folder."""

import json
from pathlib import Path

import numpy as np
import pytest

from forebear.studies import removal
from forebear.studies.base import StudyResult
from forebear.studies.removal.experiments import cell, fit_law, self_logit_slopes


def test_the_exponents_are_inside_the_published_intervals() -> None:
    cells = [
        one
        for n in (1000, 2000, 4000)
        for d in (4, 12, 36)
        for one in cell(n, d, (2, 8, 32, 128), range(4), 12)
    ]
    n, d, k = (np.log([getattr(c, axis) for c in cells]) for axis in "ndk")
    both = np.log([c.k + c.d for c in cells])
    laws = {
        "newton_step": (np.column_stack([n, k + d]), [c.errors["newton_step"] for c in cells]),
        "influence": (np.column_stack([n, k + d, both]), [c.gaps["influence"] for c in cells]),
        "rescaled_n": (np.column_stack([n, k + d]), [c.gaps["rescaled_n"] for c in cells]),
    }
    for name, (terms, values) in laws.items():
        law = fit_law(terms, np.array(values))
        for value, (low, high) in zip(law.values, removal.RANGES[name].values(), strict=True):
            assert low <= value <= high, (name, law)
        assert law.fit > 0.98
        assert (law.low <= law.values).all()
        assert (law.values <= law.high).all()
    for c in cells:
        assert c.errors["newton_step"].mean() < c.errors["influence"].mean()
        assert c.errors["rescaled"].mean() < c.errors["influence"].mean()


def test_a_law_is_found_where_there_is_one() -> None:
    rng = np.random.default_rng(0)
    terms = rng.normal(size=(30, 2))
    noise = np.exp(0.05 * rng.normal(size=(30, 40)))
    values = np.exp(0.3 + terms @ np.array([-2.0, 0.5]))[:, None] * noise
    law = fit_law(terms, values)
    assert np.allclose(law.values, [-2, 0.5], atol=0.02)
    assert (law.low < [-2, 0.5]).all() or np.allclose(law.low, [-2, 0.5], atol=0.02)
    assert law.fit > 0.999


def test_in_high_dimension_influence_underestimates_and_the_newton_step_does_not() -> None:
    slopes = self_logit_slopes(200, 100, 1.0, range(2), sets=30)
    assert slopes["influence"] < 0.7
    assert slopes["rescaled"] > 0.97


def test_the_study_writes_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    small = removal.Measured(
        grid=[c for n in (300, 600) for d in (2, 4) for c in cell(n, d, (2, 8), range(2), 4)],
        sweeps=[
            removal.Sweep("n", "n", [cell(n, 4, (4,), range(2), 4)[0] for n in (200, 400, 800)])
        ]
        * 2,
        corrected=[
            ((300, 2, 30, 10.0), cell(300, 2, (30,), range(2), 4, penalty=10.0)[0]),
            ((300, 2, 1, 10.0), cell(300, 2, (1,), range(2), 4, penalty=10.0)[0]),
        ],
        slopes=[(20, 1.0, self_logit_slopes(60, 20, 1.0, [0], sets=10))],
        signals=[(s, cell(300, 4, (4,), range(2), 4, signal=s)[0]) for s in (0.0, 2.0)],
        sizes=cell(300, 4, (1, 4, 16), range(2), 4),
        bounds=removal.bounds(500, 0),
    )
    monkeypatch.setattr(removal, "measure", lambda **options: small)
    result = removal.run(tmp_path, quick=True)
    names = {path.name for path in tmp_path.iterdir()}
    for figure in ("removal-laws", "removal-sizes"):
        assert {f"{figure}.png", f"{figure}.svg"} <= names
    assert {"study.json", "study.md", "report.html", "exponents.parquet", "grid.parquet"} <= names
    assert json.loads((tmp_path / "study.json").read_text())["name"] == "removal"
    again = StudyResult.load(tmp_path)
    assert [finding.claim for finding in again.findings] == [f.claim for f in result.findings]
    assert all(isinstance(finding.holds, bool) for finding in again.findings)
    proved = [finding for finding in result.findings if "proved bound" in finding.claim]
    assert proved[0].holds
