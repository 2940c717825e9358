"""The correction for a model that is not at a minimum, and horizons, against training itself."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.curvature import (
    Arnoldi,
    Dense,
    GramSpectrum,
    Kronecker,
    Nystrom,
)

SQUARED = fb.losses.squared_error
DAMPING = 0.05


def cosine(one: Tensor, other: Tensor) -> float:
    """Mean over queries."""
    one, other = one / one.norm(dim=1, keepdim=True), other / other.norm(dim=1, keepdim=True)
    return (one * other).sum(1).mean().item()


def line(n: int = 30, d: int = 4) -> tuple[nn.Linear, tuple[Tensor, Tensor]]:
    """A linear model far from the least-squares solution."""
    torch.manual_seed(0)
    model = nn.Linear(d, 1).double()
    x = torch.randn(n, d).double()
    return model, (x, x @ torch.randn(d).double() + 0.3 * torch.randn(n).double())


def prediction(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0])[:, 0]


def damped_minimum(model: nn.Linear, train: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """Where Σ w_i ℓ_i + λ/2 |θ − θ_f|² has its minimum, by the normal equations."""
    x = torch.cat([train[0], torch.ones(len(train[0]), 1).double()], 1)
    start = torch.cat([model.weight.detach()[0], model.bias.detach()])
    matrix = x.T @ (weights[:, None] * x) + DAMPING * torch.eye(len(start)).double()
    return torch.linalg.solve(matrix, x.T @ (weights * train[1]) + DAMPING * start)


def response(model: nn.Linear, train: tuple[Tensor, Tensor]) -> Tensor:
    """Derivative of that minimum in the weight of each example, by differences, `[n, P]`."""
    n, rows = len(train[0]), []
    for i in range(n):
        step = torch.zeros(n).double()
        step[i] = 1e-5
        up, down = (
            damped_minimum(model, train, torch.full((n,), 1 / n).double() + s)
            for s in (step, -step)
        )
        rows.append((up - down) / 2e-5)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "curvature",
    [Dense(kind="gauss_newton"), Dense(), GramSpectrum(), Nystrom(rank=5), Arnoldi(rank=5)],
    ids=lambda c: type(c).__name__,
)
def test_on_a_quadratic_model_it_is_exact(curvature: Any) -> None:
    model, train = line()
    x = torch.cat([train[0], torch.ones(30, 1).double()], 1)
    expected = x @ response(model, train).T / 30  # of the predictions, for the weight 1/n

    def scores(correction: Any) -> Tensor:
        method = fb.Influence(
            curvature=curvature,
            damping=fb.Absolute(DAMPING),
            units="removal",
            correction=correction,
        )
        task = fb.Task(model, SQUARED, measure=prediction)
        return method.fit(task, train).score(train).values

    assert torch.allclose(scores("training"), expected, rtol=1e-6, atol=1e-9)
    assert torch.allclose(scores("both"), expected, rtol=1e-6, atol=1e-9)
    assert cosine(scores("none"), expected) < 0.99


def test_both_asks_the_measurement_at_the_end_point() -> None:
    """The query's loss is quadratic, so its gradient depends on where it is taken."""
    model, train = line()
    x = torch.cat([train[0], torch.ones(30, 1).double()], 1)
    end = damped_minimum(model, train, torch.full((30,), 1 / 30).double())
    gradient = (x @ end - train[1])[:, None] * x  # of the losses there
    expected = -gradient @ response(model, train).T / 30
    method = fb.Influence(
        curvature=Dense(kind="gauss_newton"),
        damping=fb.Absolute(DAMPING),
        units="removal",
        correction="both",
    )
    fitted = method.fit(fb.Task(model, SQUARED), train)
    assert torch.allclose(fitted.score(train).values, expected, rtol=1e-6, atol=1e-9)
    start = torch.cat([model.weight.detach()[0], model.bias.detach()])
    assert fitted.details()["correction_length"] == pytest.approx((end - start).norm().item())


def unconverged() -> tuple[fb.Task, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    x = torch.randn(48, 4).double()
    y = (x @ torch.tensor([1.0, -1.0, 0.5, 0.0]).double()).sin() + 0.2 * torch.randn(48).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(15):
        optimizer.zero_grad()
        SQUARED(model, (x[:40], y[:40])).mean().backward()
        optimizer.step()
    return fb.Task(model.eval(), SQUARED), (x[:40], y[:40]), (x[40:], y[40:])


def minimum(task: fb.Task, train: tuple[Tensor, Tensor], weights: Tensor, damping: float) -> Any:
    """The model at the minimum of the weighted loss plus λ/2 |θ − θ_f|², by L-BFGS."""
    model = task.copy_model()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=400,
        tolerance_grad=1e-11,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        distance = sum(
            (p - q).square().sum() for p, q in zip(model.parameters(), start, strict=True)
        )
        value = (weights * SQUARED(model, train)).sum() + 0.5 * damping * distance
        value.backward()
        return value

    optimizer.step(closure)
    return model


def test_it_comes_nearer_to_further_training_of_an_unconverged_network() -> None:
    """Finite differences of the proximal minimum in each example's weight are what it predicts."""
    task, train, queries = unconverged()
    damping, step = 2.0, 1e-3
    gold = []
    for i in range(40):
        values = []
        for sign in (1, -1):
            weights = torch.full((40,), 1 / 40).double()
            weights[i] += sign * step
            values.append(-SQUARED(minimum(task, train, weights, damping), queries).detach())
        gold.append((values[0] - values[1]) / (2 * step))
    gold = torch.stack(gold, 1)
    found = {}
    for correction in ("none", "training", "both"):
        method = fb.Influence(
            curvature=Dense(kind="gauss_newton"),
            damping=fb.Absolute(damping),
            correction=correction,
        )
        found[correction] = cosine(method.fit(task, train).score(queries).values, gold)
    assert found["none"] < found["training"] < found["both"]
    assert found["both"] > 0.98


def test_at_a_minimum_it_changes_nothing() -> None:
    model, train = line()
    task = fb.Task(model, SQUARED)
    x = torch.cat([train[0], torch.ones(30, 1).double()], 1)
    best = torch.linalg.lstsq(x, train[1]).solution
    with torch.no_grad():
        model.weight.data = best[None, :-1].clone()
        model.bias.data = best[-1:].clone()
    plain, corrected = (
        fb.Influence(curvature=Dense(kind="gauss_newton"), correction=c)
        .fit(task, train)
        .score(train)
        .values
        for c in ("none", "both")
    )
    assert torch.allclose(plain, corrected, rtol=1e-8, atol=1e-11)


def test_the_model_is_left_as_it_was_and_the_fit_can_be_loaded(tmp_path: Any) -> None:
    task, train, queries = unconverged()
    before = task.model_hash()
    method = fb.Influence(name="mine", curvature=Kronecker(targets="empirical"), correction="both")
    fitted = method.fit(task, train)
    scores = fitted.score(queries).values
    own = fitted.self_influence()
    assert task.model_hash() == before
    fitted.save(tmp_path)
    again = fb.load(tmp_path, task, train)
    assert torch.allclose(again.score(queries).values, scores, rtol=1e-8)
    assert torch.allclose(again.self_influence(), own, rtol=1e-8)


def test_tied_weights_move_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).tanh())[:, :1]

    torch.manual_seed(0)
    task = fb.Task(Tied().double(), SQUARED)
    train = (torch.randn(20, 4).double(), torch.randn(20).double())
    method = fb.Influence(
        curvature=Dense(kind="gauss_newton"), damping=fb.Absolute(0.1), correction="both"
    )
    fitted = method.fit(task, train)
    state = fitted.training_moments[0].state  # type: ignore[union-attr]
    assert torch.equal(state["one.weight"], state["two.weight"])  # type: ignore[index]
    changed = state["one.weight"] - task.model.get_parameter("one.weight")  # type: ignore[index]
    assert changed.norm().item() == pytest.approx(fitted.details()["correction_length"])


@pytest.mark.parametrize("options", [{"gradient": "output"}, {"projection": True}])
def test_what_has_no_whole_loss_gradient_is_refused(options: Any) -> None:
    from forebear.projections import SJLT

    if "projection" in options:
        options = {"projection": SJLT(8)}
    with pytest.raises(fb.errors.TaskError, match="leave out projection= and gradient="):
        fb.Influence(curvature=Dense(kind="fisher"), correction="both", **options)


def test_a_curvature_that_does_not_solve_is_refused() -> None:
    model, train = line()
    with pytest.raises(fb.errors.TaskError, match="correction='training' needs the inverse"):
        fb.Influence(correction="training").fit(fb.Task(model, SQUARED), train)


def penalised(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return fb.losses.cross_entropy(model, batch) + 0.05 * model.weight.square().sum()


def logistic(
    queries: int = 40,
) -> tuple[nn.Linear, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Logistic regression at its optimum with a penalty of 0.1, on bundled data."""
    from sklearn.datasets import load_breast_cancer

    x, y = (torch.as_tensor(part) for part in load_breast_cancer(return_X_y=True))
    x = (x - x.mean(0)) / x.std(0)
    train = (x[queries:], y[queries:])
    model = nn.Linear(30, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = penalised(model, train).mean()
        value.backward()
        return value

    optimizer.step(closure)
    return model, train, (x[:queries], y[:queries])


def further(
    model: nn.Linear,
    train: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    left_out: list[int],
    rate: float,
    moments: tuple[int, ...],
) -> dict[int, Tensor]:
    """Full-batch descent on all examples and without each: rise of the query losses, `[q, m]`."""
    n, runs = len(train[0]), len(left_out) + 1
    share = torch.full((runs, n), 1 / n).double()  # of each run in each example
    share[range(1, runs), left_out] = 0.0
    weights = model.weight.detach().expand(runs, 2, 30).clone()
    labels = nn.functional.one_hot(train[1], 2).double()
    reached = {}
    for step in range(1, max(moments) + 1):
        p = torch.einsum("ni,roi->rno", train[0], weights).softmax(-1)
        gradient = torch.einsum("rn,rno,ni->roi", share, p - labels, train[0])
        weights = weights - rate * (gradient + share.sum(1)[:, None, None] * 0.1 * weights)
        if step in moments:
            logits = torch.einsum("qi,roi->rqo", queries[0], weights)
            losses = -logits.log_softmax(-1)[:, torch.arange(len(queries[1])), queries[1]]
            reached[step] = (losses[1:] - losses[:1]).T
    return reached


def test_an_exact_horizon_foresees_every_amount_of_further_training() -> None:
    """Few steps are GradDot's, many are influence's, and the filter has both and all between."""
    model, train, queries = logistic()
    left_out, moments = list(range(0, 529, 10)), (1, 3, 10, 30, 100, 300)
    hessian: Any = torch.autograd.functional.hessian(
        lambda w: nn.functional.cross_entropy(train[0] @ w.T, train[1]) + 0.05 * w.square().sum(),
        model.weight.detach(),
    )
    rate = 1 / torch.linalg.eigvalsh(hessian.reshape(60, 60))[-1].item()
    gold = further(model, train, queries, left_out, rate, moments)
    task = fb.Task(model, penalised, measure=lambda m, b: -fb.losses.cross_entropy(m, b))

    def agreement(method: fb.Influence, step: int) -> float:
        return cosine(method.fit(task, train).score(queries).values[:, left_out], gold[step])

    for step in moments:
        found = agreement(fb.Exact(damping=fb.Horizon(rate, step, exact=True)), step)
        assert found > 0.995, step
    first, last = moments[0], moments[-1]
    assert agreement(fb.GradDot(), first) > 0.999
    assert agreement(fb.Exact(damping=0.0), last) > 0.995
    assert agreement(fb.GradDot(), last) < 0.95
    assert agreement(fb.Exact(damping=0.0), first) < 0.95
