"""The Hessian study in small: what it scores with is the library's, and what it finds is there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import forebear as fb
from forebear.studies import hessians
from forebear.studies.base import Pieces, StudyResult
from forebear.studies.hessians.ladder import (
    LADDER,
    NAMES,
    Rotated,
    anatomy,
    blocks_of,
    matrices_of,
    residuals,
    shares,
)
from forebear.studies.hessians.subject import Gold, Network, Subject, outcomes_of, subject_of

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SMALL = Network(widths=(64, 6, 10), examples=150, steps=150)
DAMPING = fb.Absolute(1e-3)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Pieces:
    return Pieces(tmp_path_factory.mktemp("pieces"), {"of": "tests"})


@pytest.fixture(scope="module")
def subject(pieces: Pieces) -> Subject:
    return subject_of(SMALL, 8, 0, pieces)


@pytest.fixture(scope="module")
def rotated(subject: Subject) -> dict[str, Rotated]:
    train = subject.gradients(subject.train, subject.task.loss)
    queries = subject.gradients(subject.queries, hessians.margin)
    matrices = matrices_of(subject, 0)
    return {name: Rotated.of(matrices[name], train, queries) for name in NAMES}


def test_training_ends_at_rest_with_weight_decay_in_the_objective(subject: Subject) -> None:
    assert subject.slope < 1e-5
    model, (x, y) = subject.task.model, subject.train.batch(slice(None))
    grads = torch.autograd.grad(
        torch.nn.functional.cross_entropy(model(x), y), list(model.parameters())
    )
    slope = [g + SMALL.weight_decay * p for g, p in zip(grads, model.parameters(), strict=True)]
    assert torch.stack([s.square().sum() for s in slope]).sum().sqrt() < 1e-5
    assert subject.flipped.sum() == 15


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("hessian", fb.Exact(damping=DAMPING)),
        ("ggn", fb.Exact(curvature="gauss_newton", damping=DAMPING)),
        ("block", fb.Exact(curvature="gauss_newton", blocks="layers", damping=DAMPING)),
        ("ekfac", fb.EKFAC(targets="exact", rank=None, damping=DAMPING)),
        ("kfac", fb.KFAC(targets="exact", rank=None, damping=DAMPING)),
        ("ekfac_weighted", fb.EKFAC(rank=None, damping=DAMPING)),
        ("fisher", fb.Exact(curvature="fisher", damping=DAMPING)),
    ],
)
def test_scores_are_those_of_the_methods(
    name: str, method: fb.Influence, subject: Subject, rotated: dict[str, Rotated]
) -> None:
    fitted = method.fit(subject.task, subject.train)
    scores = fitted.score(subject.queries).values.numpy()
    mine = rotated[name].scores(DAMPING.amount)
    assert np.linalg.norm(mine - scores) < 1e-6 * np.linalg.norm(scores)
    own = fitted.self_influence().numpy() * len(subject.train)
    assert np.allclose(rotated[name].self_influence(DAMPING.amount), own, rtol=1e-5)


def test_the_identity_ranks_alike_at_every_damping(rotated: dict[str, Rotated]) -> None:
    one, other = (rotated["identity"].scores(damping) for damping in (1e-4, 1e-1))
    assert np.allclose(one * 1e-4, other * 1e-1)


def test_error_of_kfac_adds_up_and_steps_start_at_the_hessian(subject: Subject) -> None:
    matrices = matrices_of(subject, 0)
    for share in shares(subject, matrices["block"], 0):
        assert share.defect < 1e-10
        assert share.trace < 1e-10
        assert share.ekfac <= share.kfac
    steps = residuals(matrices)
    assert list(steps) == list(LADDER)[1:]
    assert steps["ggn"][0] == steps["ggn"][1]


def test_a_relu_network_has_the_same_blocks_of_both_matrices(pieces: Pieces) -> None:
    network = Network(widths=(64, 5, 5, 10), activation="relu", examples=100, steps=60, polish=1)
    other = subject_of(network, 4, 0, pieces)
    whole = [blocks_of(other, kind)[0] for kind in ("hessian", "gauss_newton")]
    found = anatomy(other, *whole)
    assert found.same_layer < 1e-12 < found.residual


def test_influence_predicts_retraining_and_better_than_without_curvature(
    subject: Subject, pieces: Pieces, rotated: dict[str, Rotated]
) -> None:
    gold = Gold(subsets=16, queries=8, steps=120, cold_seeds=1)
    outcomes = outcomes_of(subject, gold, 0, pieces)
    lds = {
        name: fb.metrics.lds(rotated[name].scores(3e-3), outcomes.masks, outcomes.warm).mean()
        for name in ("hessian", "ggn", "ekfac", "identity")
    }
    assert lds["hessian"] > 0.6
    assert lds["hessian"] > lds["identity"] + 0.15
    assert lds["ggn"] > lds["identity"] + 0.15
    assert lds["ekfac"] > lds["identity"] + 0.1


def test_wrong_labels_stand_out_whatever_the_curvature(pieces: Pieces) -> None:
    network = Network(examples=300, steps=200, polish=0)
    other = subject_of(network, 4, 0, pieces)
    for name, values in hessians.suspicions(other, 0).items():
        assert min(values) >= 0.97, (name, values)


def test_one_command_writes_tables_figures_and_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Network(widths=(64, 4, 10), examples=60, steps=40, polish=20)
    plan = hessians.Plan(
        network=tiny,
        gold=Gold(subsets=6, queries=4, steps=20, cold_seeds=2),
        suspects=replace(tiny, examples=80),
        others=(replace(tiny, activation="gelu"),),
        seeds=(3,),
    )
    monkeypatch.setattr(hessians.Plan, "of", lambda **options: plan)
    monkeypatch.setattr(hessians, "RESAMPLES", 20)
    result = hessians.run(tmp_path, quick=True)
    for name in ("damping", "ladder", "shares"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert (tmp_path / f"{name}.svg").is_file()
    assert (tmp_path / "report.html").is_file()
    assert StudyResult.load(tmp_path).findings == result.findings
    assert {table.name for table in result.tables} >= {"lds", "ladder", "shares", "mislabelled"}
    assert sum(finding.holds is not None for finding in result.findings) >= 10
    lds = next(table for table in result.tables if table.name == "lds")
    assert len(lds.rows) == len(NAMES)
    again = hessians.run(tmp_path, quick=True)  # from the retrainings that are there
    assert next(table for table in again.tables if table.name == "lds").rows == lds.rows
