"""Where methods meet: limits and equalities between them that theory promises."""

from typing import Any

import pytest
import torch
from torch import nn

import forebear as fb
from forebear.curvature import Dense, GramSpectrum
from forebear.projections import Gaussian
from tests.methods.test_influence import LOSS, QUERIES, TRAIN, N, network

LARGE = fb.Absolute(1e7)
METHODS: dict[str, Any] = {
    "diagonal": fb.Diagonal(damping=LARGE),
    "datainf": fb.DataInf(damping=LARGE),
    "arnoldi": fb.Arnoldi(damping=LARGE, rank=5, krylov=10),
    "nystrom": fb.Nystrom(damping=LARGE, rank=5),
    "gram": fb.Influence(curvature=GramSpectrum(), damping=LARGE, units="removal"),
}


@pytest.mark.parametrize("name", METHODS)
def test_large_damping_turns_influence_into_graddot(name: str) -> None:
    task = fb.Task(network(), LOSS)
    graddot = fb.GradDot().fit(task, TRAIN).score(QUERIES).values
    scores = METHODS[name].fit(task, TRAIN).score(QUERIES).values
    assert torch.allclose(scores * 1e7 * N, graddot, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_few_steps_of_a_horizon_are_graddot_too(steps: int) -> None:
    task = fb.Task(network(), LOSS)
    graddot = fb.GradDot().fit(task, TRAIN).score(QUERIES).values
    horizon = fb.Horizon(1e-7, steps, exact=True)
    scores = fb.Exact(curvature="gauss_newton", damping=horizon).fit(task, TRAIN).score(QUERIES)
    assert torch.allclose(scores.values / (1e-7 * steps) * N, graddot, rtol=1e-5, atol=1e-7)


def test_many_steps_of_a_horizon_are_the_undamped_inverse() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    train = (torch.randn(30, 4).double(), torch.randn(30).double())
    task = fb.Task(model, fb.losses.squared_error)
    exact = fb.Exact(damping=0.0).fit(task, train).score(train).values
    rate = 30 / torch.linalg.eigvalsh(train[0].T @ train[0])[-1].item()
    horizon = fb.Horizon(rate, 10_000, exact=True)
    far = fb.Exact(damping=horizon).fit(task, train).score(train).values
    assert torch.allclose(far, exact, rtol=1e-8)


def test_trak_s_kernel_is_a_quarter_of_influence_at_the_origin() -> None:
    """Binary logistic regression at θ = 0: XᵀX stands for Xᵀ diag(p (1 − p)) X, with p = 1/2.

    Of the logit, whose gradient is x, and with the residual y − p of each example as its weight.
    """
    torch.manual_seed(0)
    model = nn.Linear(5, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    train = (torch.randn(40, 5).double(), torch.randint(2, (40,)).double() * 2 - 1)

    class Logistic(fb.Objective):
        def outputs(self, model: nn.Module, batch: Any) -> torch.Tensor:
            return model(batch[0])

        def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            return -nn.functional.logsigmoid(batch[1] * outputs[:, 0])

    def logit(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0])[:, 0]

    task = fb.Task(model, Logistic(), measure=logit)
    undamped = fb.Absolute(0.0)
    trak = fb.Influence(
        gradient="output", curvature=Dense(kind="fisher"), damping=undamped, units="removal"
    )
    influence = fb.Exact(damping=undamped).fit(task, train).score(train).values
    assert torch.allclose(trak.fit(task, train).score(train).values, influence / 4, rtol=1e-9)


def test_an_ensemble_of_projections_comes_nearer_to_the_whole() -> None:
    """The same model as many checkpoints: each has its own projection, and scores are averaged."""
    model = network()
    state = model.state_dict()

    def correlation(projections: int) -> float:
        task = fb.Task(model, LOSS, checkpoints=[state] * projections)
        method = fb.Influence(
            curvature=Dense(kind="fisher"),
            projection=Gaussian(6),
            checkpoints="mean",
            damping=fb.Absolute(1e-3),
        )
        found = method.fit(task, TRAIN).score(QUERIES).values
        return torch.corrcoef(torch.stack([found.flatten(), whole.flatten()]))[0, 1].item()

    exact = fb.Influence(curvature=Dense(kind="fisher"), damping=fb.Absolute(1e-3))
    whole = exact.fit(fb.Task(model, LOSS), TRAIN).score(QUERIES).values
    one, few, many = (correlation(k) for k in (1, 8, 100))
    assert one < few < many
    assert many > one + 0.2


@pytest.mark.parametrize("name", ["diagonal", "datainf", "arnoldi", "nystrom", "relatif"])
def test_products_in_bfloat16_keep_the_scores(name: str) -> None:
    task = fb.Task(network().float(), LOSS)
    train, queries = (TRAIN[0].float(), TRAIN[1]), (QUERIES[0].float(), QUERIES[1])
    wide, narrow = (
        fb.get(name, precision=precision).fit(task, train).score(queries).values
        for precision in ("float32", "bfloat16")
    )
    assert narrow.dtype == torch.float32
    assert 0 < (wide - narrow).norm() / wide.norm() < 0.02
