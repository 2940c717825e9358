"""The Newton step of single examples, against refits and a dense solve for each example."""

import numpy as np
import pytest
import torch
from linear_oracles import least_squares, logistic, two_classes
from torch import Tensor, nn

import forebear as fb
from forebear.errors import NumericalWarning, TaskError


def ridge(n: int = 40, d: int = 5, decay: float = 0.05) -> tuple[nn.Module, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, d)), rng.standard_normal(n)
    model = nn.Linear(d, 1, bias=False).double()
    model.weight.data[:] = torch.as_tensor(least_squares(x, y, np.full(d, n * decay)))
    return model, x, y


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_for_ridge_it_is_exact_leave_one_out(decay: float) -> None:
    model, x, y = ridge(decay=decay)
    task = fb.Task(
        model, fb.losses.squared_error, measure=lambda model, batch: model(batch[0])[:, 0]
    )
    queries = np.random.default_rng(1).standard_normal((6, 5))
    penalty = np.full(5, 40 * decay)
    whole = queries @ least_squares(x, y, penalty)
    real = np.stack(
        [
            whole - queries @ least_squares(np.delete(x, i, 0), np.delete(y, i), penalty)
            for i in range(40)
        ],
        1,
    )
    train = (torch.as_tensor(x), torch.as_tensor(y)[:, None])
    fitted = fb.NewtonStep(damping=fb.Absolute(decay)).fit(task, train, batch_size=9)
    found = fitted.score((torch.as_tensor(queries), torch.zeros(6, 1).double()))
    assert np.allclose(found.values, real, atol=1e-10)
    assert found.provenance.units == "removal"


def test_of_one_output_it_is_influence_over_one_less_the_leverage() -> None:
    x, y = two_classes(60, 3, 0)
    decay = 0.02
    theta = logistic(x, y, np.full(3, 60 * decay))
    # Two logits of which one is fixed at zero are one logit.
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data[:] = torch.as_tensor(theta)

    class OneLogit(fb.Objective):
        def outputs(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return model(batch[0])

        def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            z = outputs[:, 0]
            return nn.functional.softplus(z) - batch[1] * z

    task = fb.Task(model, OneLogit())
    train = (torch.as_tensor(x), torch.as_tensor(y).double())
    queries = tuple(torch.as_tensor(value).double() for value in two_classes(5, 3, 1))
    newton = fb.NewtonStep(damping=fb.Absolute(decay)).fit(task, train)
    influence = fb.Exact(curvature="gauss_newton", damping=fb.Absolute(decay)).fit(task, train)
    p = 1 / (1 + np.exp(-x @ theta))
    hessian = (x * (p * (1 - p))[:, None]).T @ x + 60 * decay * np.eye(3)
    h = (p * (1 - p)) * np.einsum("np,np->n", x, np.linalg.solve(hessian, x.T).T)
    expected = influence.score(queries).values / torch.as_tensor(1 - h)
    assert torch.allclose(newton.score(queries).values, expected, rtol=1e-9)
    own = influence.self_influence() / torch.as_tensor(1 - h)
    assert torch.allclose(newton.self_influence(), own, rtol=1e-9)


def network() -> tuple[fb.Task, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(30, 3, dtype=torch.float64)
    return fb.Task(model, fb.losses.cross_entropy), (x, torch.arange(30) % 3)


def test_for_a_network_it_solves_without_each_example() -> None:
    task, train = network()
    queries = (train[0][:4] + 0.1, train[1][:4])
    damping = 0.03
    found = fb.NewtonStep(damping=fb.Absolute(damping)).fit(task, train, batch_size=7)
    parameters = dict(task.model.named_parameters())

    def logits(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(task.model, values, (x[None],))[0]

    def rows(x: Tensor) -> Tensor:
        jacobian = torch.func.vmap(torch.func.jacrev(logits), (None, 0))(parameters, x)
        return torch.cat([part.flatten(2) for part in jacobian.values()], 2).detach()

    j, z = rows(train[0]), task.model(train[0]).detach()
    p = z.softmax(1)
    v = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    each = j.mT @ v @ j  # [n, P, P]
    gradients = torch.einsum("ncp,nc->np", j, p - nn.functional.one_hot(train[1], 3))
    pq = task.model(queries[0]).detach().softmax(1) - nn.functional.one_hot(queries[1], 3)
    asked = torch.einsum("ncp,nc->np", rows(queries[0]), pq)
    whole = each.sum(0) + 30 * damping * torch.eye(j.shape[2], dtype=torch.float64)
    moved = torch.linalg.solve(whole - each, gradients)
    assert torch.allclose(found.score(queries).values, asked @ moved.T, rtol=1e-8)


def test_far_damping_makes_it_influence() -> None:
    task, train = network()
    one = fb.NewtonStep(damping=fb.Absolute(1e4)).fit(task, train).score(train).values
    other = fb.Exact(curvature="gauss_newton", damping=fb.Absolute(1e4))
    assert torch.allclose(one, other.fit(task, train).score(train).values, rtol=1e-4)


def test_an_example_alone_in_a_direction_is_cut_off_with_a_warning() -> None:
    model, x, y = ridge(decay=0.0)
    x[:, 4] = 0
    x[3, 4] = 1.0
    model.weight.data[:] = torch.as_tensor(least_squares(x, y, np.zeros(5)))
    task = fb.Task(model, fb.losses.squared_error)
    train = (torch.as_tensor(x), torch.as_tensor(y)[:, None])
    with pytest.warns(NumericalWarning, match="leverage within"):
        fitted = fb.NewtonStep(damping=fb.Absolute(0.0)).fit(task, train)
    assert torch.isfinite(fitted.score(train).values).all()


def test_a_plain_loss_and_many_outputs_are_refused() -> None:
    task, train = network()
    plain = fb.Task(task.model, lambda model, batch: fb.losses.cross_entropy(model, batch))
    with pytest.raises(TaskError, match="plain loss"):
        fb.NewtonStep().fit(plain, train)
    wide = fb.Task(nn.Linear(3, 1200), fb.losses.cross_entropy)
    with pytest.raises(TaskError, match="1200 outputs"):
        fb.NewtonStep().fit(wide, (train[0].float(), train[1]))


def test_layers_restrict_it() -> None:
    task, train = network()
    whole = fb.NewtonStep(layers=("2",)).fit(task, train).score(train)
    part = fb.NewtonStep().fit(task.select("2"), train).score(train)
    assert torch.allclose(whole.values, part.values)
    assert whole.provenance.coverage == pytest.approx(15 / 31)


def test_another_damping_is_another_fit_with_it() -> None:
    task, train = network()
    fitted = fb.NewtonStep(damping=0.1).fit(task, train, batch_size=11)
    again, fresh = fitted.with_damping(0.02), fb.NewtonStep(damping=0.02).fit(task, train)
    assert torch.allclose(again.score(train).values, fresh.score(train).values, rtol=1e-8)
    assert torch.allclose(again.self_influence(), fresh.self_influence(), rtol=1e-8)
