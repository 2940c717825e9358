"""Curvature in the span of its rows: the same numbers as the dense matrix."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.curvature import Dense, GramSpectrum, Whole
from forebear.curvature.dense import FittedDense
from forebear.curvature.spectrum import FittedSpectrum
from tests.oracles import gradients_one_at_a_time

N, Q = 20, 5
LOSS = fb.losses.cross_entropy


def case() -> tuple[fb.Task, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """87 parameters, 20 examples, 3 classes: 40 or 20 rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()
    x, y = torch.randn(N + Q, 6).double(), torch.randint(3, (N + Q,))
    return fb.Task(model, LOSS), (x[:N], y[:N]), (x[N:], y[N:])


def influence(curvature: Any, damping: Any) -> fb.Influence:
    return fb.Influence(curvature=curvature, damping=damping, units="removal")


DAMPINGS = [0.1, fb.Absolute(1e-4), fb.Horizon(0.5, 30), fb.Horizon(0.5, 30, exact=True)]


@pytest.mark.parametrize("damping", DAMPINGS, ids=str)
@pytest.mark.parametrize("kind", ["gauss_newton", "fisher"])
def test_scores_are_those_of_the_dense_matrix(kind: Any, damping: Any) -> None:
    task, train, queries = case()
    dense = influence(Dense(kind=kind), damping).fit(task, train)
    gram = influence(GramSpectrum(kind=kind), damping).fit(task, train)
    expected = dense.score(queries).values
    assert torch.allclose(gram.score(queries).values, expected, rtol=1e-8, atol=1e-12)
    assert torch.allclose(gram.self_influence(), dense.self_influence(), rtol=1e-8)
    used = dense.details()["damping_used"]["all"]
    assert gram.details()["damping_used"]["all"] == pytest.approx(used, rel=1e-9)


def test_the_dual_form_is_the_primal_one() -> None:
    """Woodbury: (1/λ) (v − Gᵀ (nλI + GGᵀ)⁻¹ G v), from gradients one at a time."""
    task, train, queries = case()
    g, q = (
        torch.cat([x.flatten(1) for x in gradients_one_at_a_time(task.model, LOSS, b).values()], 1)
        for b in (train, queries)
    )
    damping = 3e-3
    inner = torch.linalg.solve(N * damping * torch.eye(N).double() + g @ g.T, g @ q.T)
    expected = ((q - inner.T @ g) / damping) @ g.T / N
    method = influence(GramSpectrum(kind="fisher"), fb.Absolute(damping))
    found = method.fit(task, train).score(queries).values
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-13)


def test_exact_takes_the_smaller_form() -> None:
    task, train, queries = case()
    x = torch.randn(200, 6).double()
    many = (x, torch.randint(3, (200,)))
    method = fb.Exact(curvature="gauss_newton", damping=0.1)
    few = method.fit(task, train)
    assert isinstance(few.curvatures[0], FittedSpectrum)
    assert isinstance(method.fit(task, many).curvatures[0], FittedDense)
    assert isinstance(fb.Exact().fit(task, train).curvatures[0], FittedDense)
    dense = influence(Dense(kind="gauss_newton"), 0.1).fit(task, train).score(queries).values
    assert torch.allclose(few.score(queries).values, dense, rtol=1e-8, atol=1e-12)


def test_more_parameters_than_a_matrix_may_have() -> None:
    model = nn.Sequential(nn.Linear(200, 101)).double()
    task = fb.Task(model, LOSS)
    data = (torch.randn(8, 200).double(), torch.randint(101, (8,)))
    fitted = fb.Exact(curvature="fisher", damping=0.1).fit(task, data)
    grads = gradients_one_at_a_time(model, LOSS, data)
    g = torch.cat([x.flatten(1) for x in grads.values()], 1)
    kernel = g @ g.T
    damping = 0.1 * kernel.trace() / 8 / g.shape[1]
    expected = torch.linalg.solve(kernel / 8 + damping * torch.eye(8).double(), kernel) / 8
    assert torch.allclose(fitted.score(data).values, expected.T, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("damping", [0.5, fb.Horizon(0.2, 9, exact=True)], ids=str)
@pytest.mark.parametrize("kind", ["gauss_newton", "fisher"])
def test_with_another_damping_it_is_as_if_fitted_with_it(kind: Any, damping: Any) -> None:
    task, train, queries = case()
    for curvature in (Dense(kind=kind), GramSpectrum(kind=kind)):
        first = influence(curvature, 1e-3).fit(task, train)
        again = first.with_damping(damping).score(queries)
        straight = influence(curvature, damping).fit(task, train).score(queries)
        assert torch.allclose(again.values, straight.values, rtol=1e-8, atol=1e-12)
        assert again.provenance.settings["damping_used"]["all"] == pytest.approx(
            straight.provenance.settings["damping_used"]["all"], rel=1e-9
        )


def test_an_effective_dimension_counts_what_the_data_decide() -> None:
    task, train, _ = case()
    g = torch.cat(
        [x.flatten(1) for x in gradients_one_at_a_time(task.model, LOSS, train).values()], 1
    )
    values = torch.linalg.eigvalsh(g @ g.T / N)
    for curvature in (Dense(kind="fisher"), GramSpectrum(kind="fisher")):
        fitted = influence(curvature, fb.EffectiveDimension(0.3)).fit(task, train)
        damping = fitted.details()["damping_used"]["all"]
        reached = (values / (values + damping)).sum().item()
        assert reached == pytest.approx(0.3 * N, rel=1e-6)


def test_steps_that_diverge_are_refused_with_the_largest_that_do_not() -> None:
    task, train, _ = case()
    damping = fb.Horizon(1e4, 5, exact=True)
    with pytest.raises(fb.errors.TaskError, match=r"h_max = .*largest stable learning rate"):
        influence(GramSpectrum(), damping).fit(task, train)


def test_no_damping_needs_as_many_rows_as_parameters() -> None:
    task, train, _ = case()
    with pytest.raises(fb.errors.TaskError, match="83 dimensions and fewer independent gradients"):
        influence(GramSpectrum(), 0.0).fit(task, train)


def test_too_many_rows_are_refused() -> None:
    model = nn.Linear(2, 2)
    task = fb.Task(model, LOSS)
    data = (torch.randn(20_001, 2), torch.zeros(20_001, dtype=torch.long))
    with pytest.raises(fb.errors.TaskError, match="20001 rows are too many"):
        influence(GramSpectrum(), 0.1).fit(task, data)


def test_blocks_and_pseudo_inverses_stay_dense() -> None:
    task, train, queries = case()
    for dense in (
        Dense(kind="fisher", blocks="layers"),
        Dense(kind="fisher", indefinite="pseudo_inverse"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = influence(Whole(dense), 0.1).fit(task, train).score(queries).values
            other = influence(dense, 0.1).fit(task, train).score(queries).values
        assert torch.equal(one, other)
