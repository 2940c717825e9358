"""RelatIF: influence divided by what an example does at large."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.curvature import Dense
from tests.methods.test_influence import LOSS, QUERIES, TRAIN, N, flat, network


def inverse(model: nn.Module) -> Tensor:
    z = flat(model, TRAIN)
    matrix = z.T @ z / N
    return torch.linalg.inv(matrix + 0.1 * matrix.trace() / len(matrix) * torch.eye(53).double())


@pytest.mark.parametrize("form", ["loss", "parameters"])
def test_scores_are_divided_by_the_example_s_own_length(form: Any) -> None:
    model = network()
    q, z, solve = flat(model, QUERIES), flat(model, TRAIN), inverse(model)
    lengths = (z @ solve * z).sum(1).sqrt() if form == "loss" else (z @ solve).norm(dim=1)
    fitted = fb.RelatIF(curvature="fisher", form=form).fit(fb.Task(model, LOSS), TRAIN)
    assert torch.allclose(fitted.score(QUERIES).values, q @ solve @ z.T / lengths, rtol=1e-7)
    own = (z @ solve * z).sum(1) / lengths
    assert torch.allclose(fitted.self_influence(), own, rtol=1e-7)


def test_the_loss_form_does_not_see_how_large_a_gradient_is() -> None:
    """Weights of examples leave no trace, where C is kept the same."""

    def weighted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return LOSS(model, batch) * batch[0][:, 0].abs().add(0.5).detach()

    model = network()
    for form in ("relative", "relative_parameters"):
        method = fb.Influence(curvature=Dense(kind="fisher"), normalise=form)
        one = method.fit(fb.Task(model, weighted, measure=lambda m, b: -LOSS(m, b)), TRAIN)
        z = flat(model, TRAIN) * TRAIN[0][:, :1].abs().add(0.5)
        matrix = z.T @ z / N
        matrix += 0.1 * matrix.trace() / 53 * torch.eye(53).double()
        g = flat(model, TRAIN)  # unweighted
        solved = torch.linalg.solve(matrix, g.T).T
        lengths = (solved * g).sum(1).sqrt() if form == "relative" else solved.norm(dim=1)
        expected = flat(model, QUERIES) @ solved.T / lengths
        assert torch.allclose(one.score(QUERIES).values, expected, rtol=1e-7)


@pytest.mark.parametrize("form", ["loss", "parameters"])
@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal", "gauss_newton", "hessian"])
def test_every_curvature_has_both_forms(curvature: Any, form: Any) -> None:
    fitted = fb.RelatIF(curvature=curvature, form=form).fit(fb.Task(network(), LOSS), TRAIN)
    own = fitted.self_influence()
    same = fitted.score(TRAIN).values.diagonal()
    assert torch.allclose(own, same, rtol=1e-6)
    assert fitted.units == "ranking"


@pytest.mark.parametrize("form", ["loss", "parameters"])
def test_a_zero_gradient_scores_zero_and_is_told(form: Any) -> None:
    def silent(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return LOSS(model, batch) * (batch[0][:, 0] < 100)

    x = TRAIN[0].clone()
    x[4, 0] = 1000.0
    fitted = fb.RelatIF(curvature="fisher", form=form).fit(
        fb.Task(network(), silent), (x, TRAIN[1])
    )
    with pytest.warns(fb.errors.NumericalWarning, match="1 training examples have a zero"):
        scores = fitted.score(QUERIES).values
    assert (scores[:, 4] == 0).all()
    assert torch.isfinite(scores).all()


def test_the_length_of_a_step_needs_a_curvature_that_solves() -> None:
    method = fb.Influence(normalise="relative_parameters")
    with pytest.raises(fb.errors.TaskError, match="FittedIdentity does not form"):
        method.fit(fb.Task(network(), LOSS), TRAIN)


def test_an_unknown_choice_comes_with_the_nearest() -> None:
    with pytest.raises(fb.errors.UnknownNameError, match="did you mean 'ekfac'"):
        fb.RelatIF(curvature="ekfak")  # type: ignore[arg-type]
    with pytest.raises(fb.errors.UnknownNameError, match="form of RelatIF"):
        fb.RelatIF(form="los")  # type: ignore[arg-type]
