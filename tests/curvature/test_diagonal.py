"""Diagonal curvature against squared gradients written out one at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import forebear as fb
from forebear.curvature import Diagonal
from tests.cases import CASES, Case
from tests.oracles import gradients_one_at_a_time

LOSS = fb.losses.cross_entropy


def flat(model: nn.Module, loss: Any, batch: Any) -> Tensor:
    grads = gradients_one_at_a_time(model, loss, batch)
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_are_those_of_squared_gradients(case: Case) -> None:
    model, batch = case.model(), case.data()
    g = flat(model, case.loss, batch)
    expected = (g / (g.square().mean(0) + 1e-2)) @ g.T / len(g)
    method = fb.Diagonal(targets="empirical", damping=fb.Absolute(1e-2))
    fitted = method.fit(fb.Task(model, case.loss), batch)
    assert torch.allclose(fitted.score(batch).values, expected, rtol=1e-7, atol=1e-11)
    assert torch.allclose(fitted.self_influence(), expected.diagonal(), rtol=1e-7, atol=1e-11)


def small() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    return model, (torch.randn(12, 4).double(), torch.randint(3, (12,)))


def test_exact_targets_are_the_diagonal_of_gauss_newton() -> None:
    model, batch = small()
    parameters = list(model.parameters())
    total = torch.zeros(43).double()
    for x in batch[0]:
        logits = model(x[None])[0]
        p = logits.detach().softmax(0)
        for c in range(3):  # the expectation over labels of the squared gradient
            label = torch.tensor([c])
            loss = F.cross_entropy(logits[None], label)
            grads = torch.autograd.grad(loss, parameters, retain_graph=True)
            total += p[c] * torch.cat([g.flatten() for g in grads]).square() / len(batch[0])
    g = flat(model, LOSS, batch)
    expected = (g / (total + 1e-3)) @ g.T / len(g)
    method = fb.Diagonal(targets="exact", damping=fb.Absolute(1e-3))
    scores = method.fit(fb.Task(model, LOSS), batch).score(batch).values
    assert torch.allclose(scores, expected, rtol=1e-8)


def diagonal(fitted: Any) -> Tensor:
    blocks = fitted.curvatures[0].blocks.values()
    return torch.cat([block.eigenvalues.flatten() for block in blocks])


def test_sampled_targets_approach_the_exact_ones() -> None:
    model, (x, y) = small()
    many = (x.repeat(400, 1), y.repeat(400))
    task = fb.Task(model, LOSS)
    exact, drawn = (diagonal(fb.Diagonal(targets=t).fit(task, many)) for t in ("exact", "sampled"))
    assert (drawn - exact).norm() / exact.norm() < 0.05


def test_another_damping_needs_no_new_squares() -> None:
    model, batch = small()
    task = fb.Task(model, LOSS)
    first = fb.Diagonal(targets="empirical").fit(task, batch)
    again = first.with_damping(fb.Absolute(0.3)).score(batch).values
    straight = fb.Diagonal(targets="empirical", damping=fb.Absolute(0.3)).fit(task, batch)
    assert torch.equal(again, straight.score(batch).values)


def test_projected_gradients_have_no_gauss_newton_diagonal() -> None:
    from forebear.projections import Gaussian

    model, batch = small()
    with pytest.raises(fb.errors.TaskError, match="targets='empirical'"):
        fb.Influence(curvature=Diagonal(targets="exact"), projection=Gaussian(8))
    method = fb.Influence(
        curvature=Diagonal(targets="empirical"), projection=Gaussian(8), damping=fb.Absolute(1e-3)
    )
    fitted = method.fit(fb.Task(model, LOSS), batch)
    phi = fitted.training[0].features
    expected = (phi / (phi.square().mean(0) + 1e-3)) @ phi.T
    assert torch.allclose(fitted.score(batch).values, expected, rtol=1e-7)
