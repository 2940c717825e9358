"""Methods for images that work in other processes, and give the bits of this one."""

from pathlib import Path
from typing import Any

import pytest
import torch

import forebear as fb
from forebear import stream as streams
from forebear.executors.processes import Processes
from forebear.methods.mucs import fitted as mucs_state
from forebear.methods.nda import fitted as nda_state
from tests.denoising_cases import case
from tests.methods.test_elsewhere import Parcels

TASK, TRAIN, QUERIES = case()
METHODS: dict[str, Any] = {
    "mucs": fb.MUCS(
        layers=("last",), retain=False, null=3.0, batch_size=20, learning_rate=1e-2, levels=3
    ),
    "mucs, fresh noise": fb.MUCS(
        layers=("last",), null=3.0, batch_size=20, max_steps=3, levels=3, consistent=False
    ),
    "nda": fb.NDA(patch=3, timesteps=(50, 200)),
    "nda, two scales": fb.NDA(patch=1, scale="both", keep=2),
    "das": fb.DAS(),
    "dtrak": fb.DTRAK(dimension=16),
    "abu": fb.AbU(query_draws=8, fisher_draws=2),
    "abu, steps": fb.AbU(query_draws=8, fisher_draws=2, mode="step"),
}

pytestmark = pytest.mark.filterwarnings("ignore::forebear.errors.NumericalWarning")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PIECE", 8)
    monkeypatch.setattr(mucs_state, "TOGETHER", 3)
    monkeypatch.setattr(nda_state, "KEPT_BYTES", 2000)


def fit(name: str, **options: Any) -> Any:
    return METHODS[name].fit(TASK, TRAIN, batch_size=4, **options)


@pytest.mark.parametrize("name", METHODS)
def test_pieces_worked_out_elsewhere_give_the_same_bits(name: str) -> None:
    here, there = fit(name), fit(name, executor=Parcels())
    kept = there.tensors()
    for key, value in here.tensors().items():
        assert torch.equal(value, kept[key]), key
    whole, far = here.score(QUERIES), there.score(QUERIES)
    assert torch.equal(whole.values, far.values)
    assert whole.provenance.settings == far.provenance.settings
    assert torch.equal(here.self_influence(), there.self_influence())
    top = there.top(QUERIES, k=4)
    assert (top.ids == here.top(QUERIES, k=4).ids).all()
    assert top.provenance == here.top(QUERIES, k=4).provenance


@pytest.mark.parametrize("name", ["mucs", "nda"])
def test_two_processes_give_the_bits_of_this_one(name: str) -> None:
    there = fit(name, executor=Processes(workers=2, threads=1))
    assert torch.equal(there.score(QUERIES).values, fit(name).score(QUERIES).values)


def test_queries_that_were_unlearned_are_not_unlearned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit("mucs")
    first = fitted.score_to(QUERIES, tmp_path)
    whole = fitted.score(QUERIES)

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(mucs_state, "forget", never)
    again = fit("mucs").score_to(QUERIES, tmp_path)
    assert again.provenance == first.provenance == whole.provenance
    assert torch.equal(again.rows(again.query_ids), whole.values)
