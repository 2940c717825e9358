"""Dense curvature: what becomes of negative eigenvalues, and what is refused."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import forebear as fb
from forebear.curvature import Dense

AXES = torch.eye(3, dtype=torch.float64)
SIGNS = torch.tensor([2.0, 1.0, -0.5], dtype=torch.float64)
WEIGHTS = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)


def saddle(model: nn.Module, batch: Any) -> Tensor:
    """`c (w·x)² / 2`, whose Hessian is the mean of `c x xᵀ`."""
    x, c = batch
    return 0.5 * c * model(x)[:, 0].square()


def task() -> fb.Task:
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(WEIGHTS)
    return fb.Task(model, saddle)


TRAIN = (AXES, SIGNS)
HESSIAN = SIGNS / 3  # its diagonal; the rest is zero


def expected(eigenvalues: Tensor, damping: float) -> Tensor:
    """Scores of the training examples for themselves: only equal axes meet."""
    gradients = SIGNS * WEIGHTS[0]
    return torch.diag(gradients.square() / (eigenvalues + damping) / 3)


@pytest.mark.parametrize(
    ("indefinite", "eigenvalues"),
    [("absolute", HESSIAN.abs()), ("clip", HESSIAN.clamp_min(0)), ("keep", HESSIAN)],
)
def test_negative_eigenvalues_become_what_was_asked(indefinite: Any, eigenvalues: Tensor) -> None:
    damping = 0.3  # covers the lowest, -1/6
    method = fb.Exact(indefinite=indefinite, damping=fb.Absolute(damping))
    fitted = method.fit(task(), TRAIN)
    scores = expected(eigenvalues, damping)
    assert torch.allclose(fitted.score(TRAIN).values, scores, rtol=1e-9, atol=1e-14)
    assert torch.allclose(fitted.self_influence(), scores.diagonal(), rtol=1e-9)


def test_an_eigenvalue_that_damping_does_not_cover_is_warned_about() -> None:
    method = fb.Exact(indefinite="keep", damping=fb.Absolute(0.05))
    with pytest.warns(
        fb.errors.NumericalWarning, match=r"lowest eigenvalue is -0\.167 and damping 0\.05"
    ):
        fitted = method.fit(task(), TRAIN)
    assert torch.allclose(
        fitted.score(TRAIN).values, expected(HESSIAN, 0.05), rtol=1e-9, atol=1e-14
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in ("absolute", "clip"):
            fb.Exact(indefinite=other, damping=fb.Absolute(0.05)).fit(task(), TRAIN)


def test_relative_damping_is_of_the_mean_eigenvalue() -> None:
    train = (AXES, SIGNS.abs())
    fitted = fb.Exact(damping=0.5).fit(task(), train)
    used = 0.5 * HESSIAN.abs().mean().item()
    assert fitted.details()["damping_used"] == {"all": pytest.approx(used, rel=1e-12)}
    scores = expected(HESSIAN.abs(), used)
    assert torch.allclose(fitted.score(train).values, scores, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("indefinite", "damping"), [("clip", 0.0), ("keep", 1 / 6)], ids=["clipped", "cancelled"]
)
def test_a_singular_hessian_is_refused(indefinite: Any, damping: float) -> None:
    method = fb.Exact(indefinite=indefinite, damping=fb.Absolute(damping))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(fb.errors.TaskError, match=r"singular.*increase the damping"):
            method.fit(task(), TRAIN)


def test_fewer_gradients_than_dimensions_need_damping() -> None:
    few = (AXES[:2], SIGNS[:2])
    with pytest.raises(fb.errors.TaskError, match="3 dimensions and fewer independent gradients"):
        fb.Exact(curvature="fisher", damping=0.0).fit(task(), few)
    assert fb.Exact(curvature="fisher", damping=0.1).fit(task(), few).score(few).values.shape


def test_too_many_parameters_are_refused_with_a_remedy() -> None:
    model = nn.Linear(200, 101)
    data = (torch.randn(4, 200), torch.zeros(4, dtype=torch.long))
    large = fb.Task(model, fb.losses.cross_entropy)
    with pytest.raises(fb.errors.TaskError, match=r"20301 parameters does not fit.*layers="):
        fb.Exact().fit(large, data)


def test_the_gauss_newton_matrix_needs_few_outputs() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1001))
    data = (torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
    task = fb.Task(model, fb.losses.cross_entropy)
    with pytest.raises(fb.errors.TaskError, match="each of 1001 outputs"):
        fb.Exact(curvature="gauss_newton").fit(task, data)


def test_gauss_newton_of_sequences_sums_over_positions() -> None:
    """Against Jacobians of all outputs, with a loss that adds up over positions."""

    class PerPosition(fb.Objective):
        def outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0])

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            tokens = F.cross_entropy(outputs.mT, batch[1], reduction="none")
            return tokens.sum(1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = (torch.randn(9, 5, 3).double(), torch.randint(2, (9, 5)))
    parameters = list(model.parameters())
    total, grads = torch.zeros(26, 26).double(), []
    for x, y in zip(*batch, strict=True):
        logits = model(x)
        grads.append(flat_grad(F.cross_entropy(logits, y, reduction="sum"), parameters))
        for position in logits:
            jacobian = torch.stack([flat_grad(z, parameters) for z in position])
            p = position.detach().softmax(0)
            total += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / 9
    z = torch.stack(grads)
    damped = total + 0.1 * total.trace() / 26 * torch.eye(26).double()
    method = fb.Exact(curvature="gauss_newton", damping=0.1)
    scores = method.fit(fb.Task(model, PerPosition()), batch)
    assert torch.allclose(
        scores.score(batch).values, z @ torch.linalg.solve(damped, z.T) / 9, rtol=1e-8, atol=1e-12
    )


def flat_grad(value: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    grads = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def test_a_dense_curvature_meets_one_hot_gradients() -> None:
    """An embedding's rows written out, with a curvature over all layers together."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 3)).double()
    batch = (torch.randint(5, (20, 3)), torch.randint(3, (20,)))
    parameters = list(model.parameters())
    z = torch.stack(
        [
            flat_grad(F.cross_entropy(model(x[None]), y[None]), parameters)
            for x, y in zip(*batch, strict=True)
        ]
    )
    damped = z.T @ z / 20
    damped += 0.1 * damped.trace() / len(damped) * torch.eye(len(damped)).double()
    method = fb.Influence(curvature=Dense(kind="fisher"), units="removal")
    scores = method.fit(fb.Task(model, fb.losses.cross_entropy), batch).score(batch).values
    assert torch.allclose(scores, z @ torch.linalg.solve(damped, z.T) / 20, rtol=1e-8, atol=1e-12)
