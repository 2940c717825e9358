"""A sweep over dampings: the scores of separate fits, compared in the plain way."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import forebear as fb
from forebear.curvature import Dense, Kronecker
from forebear.methods.sweep import DampingSweep
from tests.methods.test_influence import LOSS, QUERIES, TRAIN, Q, network

FACTORS = (1e-3, 0.1, 10.0)
METHODS: dict[str, Any] = {
    "ekfac": fb.EKFAC(rank=None),
    "kfac, short sums": fb.KFAC(),
    "hessian": fb.Exact(),
    "gauss_newton": fb.Exact(curvature="gauss_newton"),
    "layers": fb.Exact(curvature="fisher", blocks="layers"),
    "diagonal": fb.Diagonal(),
    "datainf": fb.DataInf(),
    "arnoldi": fb.Arnoldi(rank=20, krylov=30),
    "nystrom": fb.Nystrom(rank=20),
    "relatif": fb.RelatIF(),
    "corrected": fb.Influence(
        name="corrected", curvature=Dense(kind="gauss_newton"), correction="both"
    ),
    "trak": fb.TRAK(dimension=16),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_damping_of_the_sweep_is_a_fit_with_it(name: str) -> None:
    from dataclasses import replace

    method, task = METHODS[name], fb.Task(network(), LOSS)
    found = fb.damping_sweep(task, TRAIN, QUERIES, method, FACTORS)
    for i, factor in enumerate(FACTORS):
        fitted = replace(method, damping=factor).fit(task, TRAIN)
        used = fitted.details()["damping_used"]
        assert found.damping_used[i] == pytest.approx(used, rel=1e-8)
        assert torch.allclose(found.scores[i], fitted.score(QUERIES).values, rtol=1e-6, atol=1e-9)


def test_the_curvature_is_estimated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fit = Kronecker.fit
    monkeypatch.setattr(Kronecker, "fit", lambda self, *a: calls.append(1) or fit(self, *a))
    fb.damping_sweep(fb.Task(network(), LOSS), TRAIN, QUERIES, "ekfac", FACTORS)
    assert len(calls) == 1


def test_correlations_are_means_over_queries() -> None:
    found = fb.damping_sweep(fb.Task(network(), LOSS), TRAIN, QUERIES, "diagonal", FACTORS)
    one, other = found.scores[0].numpy(), found.scores[2].numpy()
    ranks = np.mean([np.asarray(spearmanr(one[q], other[q]))[0] for q in range(Q)])
    cosines = [
        one[q] @ other[q] / np.linalg.norm(one[q]) / np.linalg.norm(other[q]) for q in range(Q)
    ]
    assert found.spearman[0, 2] == pytest.approx(ranks, rel=1e-9)
    assert found.cosine[0, 2] == pytest.approx(np.mean(cosines), rel=1e-9)
    assert np.allclose(np.diag(found.spearman), 1)


def sweep(neighbours: list[float]) -> DampingSweep:
    size = len(neighbours) + 1
    matrix = np.eye(size)
    for i, value in enumerate(neighbours):
        matrix[i, i + 1] = matrix[i + 1, i] = value
    factors = tuple(10.0**i for i in range(size))
    used = tuple({"all": factor} for factor in factors)
    return DampingSweep("mine", factors, used, matrix, matrix, torch.zeros(size, 1, 1))


@pytest.mark.parametrize(
    ("neighbours", "expected"),
    [
        ([0.99, 0.5, 0.97, 0.96], (100.0, 10_000.0)),
        ([0.99, 0.5, 0.97], (1.0, 10.0)),
        ([0.99, 0.99], (1.0, 100.0)),
        ([0.1, 0.2], None),
    ],
)
def test_the_stable_range_is_the_longest_run(neighbours: list[float], expected: Any) -> None:
    assert sweep(neighbours).stable_range == expected


def test_it_prints_as_a_table() -> None:
    lines = str(sweep([0.99, 0.5, 0.97, 0.96])).splitlines()
    assert len(lines) == 2 + 5 + 1
    assert "0.990" in lines[2]
    assert lines[-1].endswith("from 1.0e+02 to 1.0e+04")
    assert "no two neighbours" in str(sweep([0.1]))


def test_methods_without_damping_are_refused() -> None:
    task = fb.Task(network(), LOSS)
    with pytest.raises(fb.errors.TaskError, match="no damping"):
        fb.damping_sweep(task, TRAIN, QUERIES, "graddot", FACTORS)
    with pytest.raises(fb.errors.TaskError, match="no damping to sweep"):
        fb.damping_sweep(task, TRAIN, QUERIES, "random", FACTORS)


@pytest.mark.parametrize("factors", [(0.1,), (0.1, 0.1), (0.0, 1.0), (-1.0, 1.0), (1.0, np.inf)])
def test_factors_must_differ_and_be_above_zero(factors: Any) -> None:
    with pytest.raises(fb.errors.DataError, match="two or more different ones"):
        fb.damping_sweep(fb.Task(network(), LOSS), TRAIN, QUERIES, "ekfac", factors)
