"""Arnoldi and Nyström against eigenvectors of the dense matrix."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.curvature import Absolute, Arnoldi, Dense, Nystrom
from forebear.curvature.low_rank import krylov_space
from forebear.curvature.operator import KeptMatrix
from forebear.data import Data
from forebear.plan import make_plan
from forebear.stream import Stream

LOSS = fb.losses.cross_entropy


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()


def rows(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5).double(), torch.randint(3, (n,))


def fit(curvature: Any, damping: float = 1e-2, n: int = 120) -> Any:
    torch.manual_seed(0)
    data = Data.of(rows(n))
    task = fb.Task(network(), LOSS)
    stream = Stream(task, make_plan(task, data), data)
    return curvature.fit(stream, task.losses, Absolute(damping), 0)


def matrix_of(fitted: Any) -> Tensor:
    """C itself, from what the fit makes of the identity."""
    inverse = fitted.solve(torch.eye(75).double())
    return torch.linalg.inv(inverse) - fitted.damping * torch.eye(75).double()


@pytest.mark.parametrize(
    "curvature", [Arnoldi(rank=75, krylov=75), Nystrom(rank=75)], ids=["arnoldi", "nystrom"]
)
def test_with_full_rank_the_solve_is_exact(curvature: Any) -> None:
    exact = fit(Dense(kind="gauss_newton")).solve(torch.eye(75).double())
    assert torch.allclose(fit(curvature).solve(torch.eye(75).double()), exact, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["gauss_newton", "fisher"])
def test_the_largest_eigenvalues_are_found(kind: Any) -> None:
    values = torch.linalg.eigvalsh(matrix_of(fit(Dense(kind=kind)))).flip(0)
    found = fit(Arnoldi(kind=kind, rank=10, krylov=40)).pairs
    assert torch.allclose(found.values, values[:10], rtol=1e-6)
    gram = found.vectors @ found.vectors.T
    assert torch.allclose(gram, torch.eye(10).double(), atol=1e-10)


def test_a_krylov_space_that_was_not_searched_to_the_end_says_so() -> None:
    short, long = (fit(Arnoldi(rank=5, krylov=k)).details()["ritz_residual"] for k in (6, 60))
    assert short > 1e-4 > 1e-8 > long


def test_an_invariant_space_ends_the_iteration() -> None:
    """Three different eigenvalues: a Krylov space has three dimensions and no more."""
    matrix = torch.diag(torch.tensor([3.0, 3.0, 1.0, 0.5, 0.5, 1.0]).double())
    operator = KeptMatrix(fit(Arnoldi()).plan, matrix)
    basis, hessenberg, last = krylov_space(operator, 6, 0)
    assert len(basis) == 3
    assert last == 0
    assert torch.allclose(
        torch.linalg.eigvalsh(hessenberg), torch.tensor([0.5, 1.0, 3.0]).double(), rtol=1e-9
    )


@pytest.mark.parametrize("rank", [5, 20, 60])
def test_nystrom_is_never_above_the_curvature(rank: int) -> None:
    exact = matrix_of(fit(Dense(kind="gauss_newton")))
    found = fit(Nystrom(rank=rank)).pairs
    below = found.vectors.T @ torch.diag(found.values) @ found.vectors
    assert torch.linalg.eigvalsh(exact - below)[0] > -1e-9
    assert len(found.values) <= rank


def test_more_random_vectors_come_nearer() -> None:
    exact = matrix_of(fit(Dense(kind="gauss_newton")))
    errors = []
    for rank in (5, 15, 40):
        found = fit(Nystrom(rank=rank)).pairs
        errors.append((exact - found.vectors.T @ torch.diag(found.values) @ found.vectors).norm())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("make", [Arnoldi, Nystrom])
def test_what_is_left_out_is_damped_or_dropped(make: Any) -> None:
    damped, dropped = (fit(make(rank=6, rest=rest)) for rest in ("damped", "drop"))
    vectors = damped.pairs.vectors
    torch.manual_seed(5)
    inside = torch.randn(2, len(vectors)).double() @ vectors
    outside = torch.randn(2, 75).double()
    outside -= outside @ vectors.T @ vectors
    assert torch.allclose(damped.solve(outside), outside / damped.damping, rtol=1e-8)
    assert torch.allclose(dropped.solve(outside), torch.zeros(2, 75).double(), atol=1e-10)
    assert torch.allclose(damped.solve(inside), dropped.solve(inside), rtol=1e-8, atol=1e-8)


def saddle(model: nn.Module, batch: Any) -> Tensor:
    """`c (w·x)² / 2`, whose Hessian is the mean of `c x xᵀ`."""
    return 0.5 * batch[1] * model(batch[0])[:, 0].square()


def test_negative_ritz_values_are_told_and_used_without_their_sign() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    task = fb.Task(model, saddle)
    train = (torch.eye(4).double(), torch.tensor([8.0, 4.0, -2.0, 1.0]).double())
    method = fb.Arnoldi(curvature="hessian", rank=4, krylov=4, damping=fb.Absolute(0.1))
    with pytest.warns(fb.errors.NumericalWarning, match=r"smallest Ritz value is -0\.5"):
        fitted = method.fit(task, train)
    curvature = torch.tensor([2.0, 1.0, 0.5, 0.25]).double()
    g = train[1] * model.weight.detach()[0]
    expected = torch.diag(g.square() / (curvature + 0.1) / 4)
    assert torch.allclose(fitted.score(train).values, expected, rtol=1e-8, atol=1e-9)
    assert fitted.details()["lowest_ritz_value"] == pytest.approx(-0.5)


def test_a_rule_about_all_eigenvalues_is_refused() -> None:
    method = fb.Nystrom(rank=5, damping=fb.EffectiveDimension(0.5))
    with pytest.raises(fb.errors.TaskError, match="needs all eigenvalues"):
        method.fit(fb.Task(network(), LOSS), rows(20))


def test_an_exact_horizon_acts_on_what_was_found() -> None:
    torch.manual_seed(0)
    train, horizon = rows(120), fb.Horizon(0.3, 11, exact=True)
    task = fb.Task(network(), LOSS)
    exact = fb.Exact(curvature="gauss_newton", damping=horizon).fit(task, train)
    found = fb.Arnoldi(rank=75, krylov=75, damping=horizon).fit(task, train)
    assert torch.allclose(
        found.score(train).values, exact.score(train).values, rtol=1e-7, atol=1e-10
    )


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 30, "krylov": 20}])
def test_more_eigenpairs_than_the_space_has_are_refused(options: Any) -> None:
    with pytest.raises(fb.errors.DataError, match="at most as many"):
        Arnoldi(**options)
    with pytest.raises(fb.errors.DataError, match="at least 1"):
        Nystrom(rank=0)
