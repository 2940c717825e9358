"""Gradient methods against dense constructions that share no code with them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.curvature import Dense, Kronecker
from tests.oracles import gradients_one_at_a_time

N, Q = 60, 7


def network(seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


TRAIN, QUERIES = data(N, 1), data(Q, 2)
LOSS = fb.losses.cross_entropy


def flat(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss gradients `[b, P]` in the order of `model.parameters()`."""
    grads = gradients_one_at_a_time(model, LOSS, batch)
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


def by_layer(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Loss gradients of each linear layer with its bias as the last column, `[b, o, i + 1]`."""
    grads = gradients_one_at_a_time(model, LOSS, batch)
    names = [name.removesuffix(".weight") for name in grads if name.endswith("weight")]
    return {
        name: torch.cat([grads[f"{name}.weight"], grads[f"{name}.bias"][:, :, None]], 2)
        for name in names
    }


def test_graddot_is_the_product_of_loss_gradients() -> None:
    model = network()
    scores = fb.GradDot().fit(fb.Task(model, LOSS), TRAIN).score(QUERIES)
    expected = flat(model, QUERIES) @ flat(model, TRAIN).T
    assert torch.allclose(scores.values, expected, rtol=1e-10)
    assert scores.provenance.units == "ranking"
    assert scores.provenance.coverage == 1.0


def test_gradcos_is_their_cosine_and_a_zero_gradient_scores_zero() -> None:
    model = network()
    scores = fb.GradCos().fit(fb.Task(model, LOSS), TRAIN).score(QUERIES).values
    q, z = flat(model, QUERIES), flat(model, TRAIN)
    expected = (q @ z.T) / q.norm(dim=1)[:, None] / z.norm(dim=1)
    assert torch.allclose(scores, expected, rtol=1e-10)

    def silent(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return LOSS(model, batch) * (batch[0][:, 0] < 100)

    x, y = TRAIN[0].clone(), TRAIN[1]
    x[4, 0] = 1000.0
    with pytest.warns(fb.errors.NumericalWarning, match="1 training examples have a zero"):
        scores = fb.GradCos().fit(fb.Task(model, silent), (x, y)).score(QUERIES).values
    assert (scores[:, 4] == 0).all()
    assert torch.isfinite(scores).all()


def test_tracin_sums_checkpoints_with_their_learning_rates() -> None:
    models = [network(seed) for seed in (1, 2, 3)]
    rates = (0.5, 0.25, 2.0)
    checkpoints = [
        fb.Checkpoint(model.state_dict(), rate) for model, rate in zip(models, rates, strict=True)
    ]
    task = fb.Task(network(), LOSS, checkpoints=checkpoints)
    before = task.model_hash()
    fitted = fb.TracIn().fit(task, TRAIN)
    expected = sum(
        rate * flat(model, QUERIES) @ flat(model, TRAIN).T
        for model, rate in zip(models, rates, strict=True)
    )
    assert torch.allclose(fitted.score(QUERIES).values, expected, rtol=1e-10)
    own = sum(
        rate * flat(model, TRAIN).square().sum(1) for model, rate in zip(models, rates, strict=True)
    )
    assert torch.allclose(fitted.self_influence(), own, rtol=1e-10)
    assert task.model_hash() == before


def test_a_custom_measurement_is_what_is_attributed() -> None:
    model = network()

    def logit(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0])[:, 1]

    scores = fb.GradDot().fit(fb.Task(model, LOSS, measure=logit), TRAIN).score(QUERIES).values
    grads = gradients_one_at_a_time(model, logit, QUERIES)
    of_logit = torch.cat([g.flatten(1) for g in grads.values()], 1)
    assert torch.allclose(scores, -of_logit @ flat(model, TRAIN).T, rtol=1e-10)


def mean_loss_hessian(model: nn.Module) -> Tensor:
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    point = torch.cat([p.detach().flatten() for p in model.parameters()])

    def mean_loss(vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in shapes])
        tensors = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        logits = torch.func.functional_call(model, tensors, (TRAIN[0],))
        return nn.functional.cross_entropy(logits, TRAIN[1])

    return torch.autograd.functional.hessian(mean_loss, point)


def gauss_newton(model: nn.Module) -> Tensor:
    """Sum over outputs from explicit Jacobians, mean convention."""
    parameters = list(model.parameters())
    total = torch.zeros(flat(model, QUERIES).shape[1:].numel(), dtype=torch.float64)
    total = torch.diag(total)
    for x in TRAIN[0]:
        logits = model(x[None])[0]
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(z, parameters, retain_graph=True)])
            for z in logits
        ]
        jacobian, p = torch.stack(rows), logits.detach().softmax(0)
        total += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return total / N


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "fisher"])
def test_exact_influence_is_a_dense_solve(kind: str) -> None:
    model = network()
    q, z = flat(model, QUERIES), flat(model, TRAIN)
    if kind == "hessian":
        values, vectors = torch.linalg.eigh(mean_loss_hessian(model))
        curvature = vectors @ torch.diag(values.abs()) @ vectors.T
        trace = values.abs().sum()
    else:
        curvature = gauss_newton(model) if kind == "gauss_newton" else z.T @ z / N
        trace = curvature.trace()
    damped = curvature + 0.1 * trace / len(curvature) * torch.eye(len(curvature)).double()
    method = fb.Exact(curvature=kind, damping=0.1)
    fitted = method.fit(fb.Task(model, LOSS), TRAIN)
    expected = q @ torch.linalg.solve(damped, z.T) / N
    assert torch.allclose(fitted.score(QUERIES).values, expected, rtol=1e-8, atol=1e-12)
    own = (z * torch.linalg.solve(damped, z.T).T).sum(1) / N
    assert torch.allclose(fitted.self_influence(), own, rtol=1e-8)


def dense_kronecker(model: nn.Module, corrected: bool) -> Tensor:
    """EK-FAC or K-FAC scores from matrices written out layer by layer, empirical targets."""
    q, z = by_layer(model, QUERIES), by_layer(model, TRAIN)
    inputs = {"0": TRAIN[0], "2": model[:2](TRAIN[0]).detach()}
    total = torch.zeros(Q, N, dtype=torch.float64)
    for name, grads in z.items():
        a = torch.cat([inputs[name], torch.ones(N, 1).double()], 1)
        # The bias column of the gradient is the output gradient itself.
        g = grads[:, :, -1]
        _, right = torch.linalg.eigh(a.T @ a / N)
        _, left = torch.linalg.eigh(g.T @ g / N)
        basis = torch.kron(left, right)  # row-major vec of [o, i + 1]
        flat_z = grads.flatten(1)
        if corrected:
            eigenvalues = (flat_z @ basis).square().mean(0)
        else:
            eigenvalues = torch.outer(
                torch.linalg.eigvalsh(g.T @ g / N), torch.linalg.eigvalsh(a.T @ a / N)
            ).flatten()
        curvature = basis @ torch.diag(eigenvalues) @ basis.T
        damped = curvature + 0.1 * eigenvalues.mean() * torch.eye(len(curvature)).double()
        total += q[name].flatten(1) @ torch.linalg.solve(damped, flat_z.T) / N
    return total


@pytest.mark.parametrize(("make", "corrected"), [(fb.EKFAC, True), (fb.KFAC, False)])
def test_kronecker_influence_is_the_dense_construction(make, corrected: bool) -> None:
    model = network()
    fitted = make(targets="empirical", rank=None).fit(fb.Task(model, LOSS), TRAIN)
    scores = fitted.score(QUERIES).values
    assert torch.allclose(scores, dense_kronecker(model, corrected), rtol=1e-7, atol=1e-12)


def test_sampled_targets_give_the_fisher_matrix_of_the_model() -> None:
    """With one layer the trace of EK-FAC's eigenvalues is that of Gauss-Newton, with no noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3, bias=False)).double().eval()
    fitted = fb.EKFAC().fit(fb.Task(model, LOSS), TRAIN)
    trace = next(iter(fitted.curvatures[0].blocks.values())).eigenvalues.sum()
    p = model(TRAIN[0]).softmax(1).detach()
    expected = ((1 - p.square().sum(1)) * TRAIN[0].square().sum(1)).mean()
    assert abs(trace / expected - 1) < 1e-9


def wide_task() -> tuple[fb.Task, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A network wide enough for the low-rank inverse to be the cheaper path."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(60, 90), nn.ReLU(), nn.Linear(90, 10)).double().eval()
    generator = torch.Generator().manual_seed(5)
    spread = torch.logspace(0, -2, 60).double()
    x = torch.randn(330, 60, generator=generator, dtype=torch.float64) * spread
    y = torch.randint(10, (330,), generator=generator)
    return fb.Task(model, LOSS), (x[:300], y[:300]), (x[300:], y[300:])


def test_the_low_rank_inverse_approaches_the_exact_one() -> None:
    task, train, queries = wide_task()
    exact = fb.EKFAC(rank=None, targets="empirical").fit(task, train).score(queries).values
    errors = []
    for tolerance in (0.3, 0.1, 0.01):
        fitted = fb.EKFAC(rank=64, tolerance=tolerance, targets="empirical").fit(task, train)
        blocks = fitted.curvatures[0].blocks.values()
        assert all(block.short is not None for block in blocks)
        scores = fitted.score(queries).values
        errors.append(((scores - exact).norm() / exact.norm()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_ekfac_self_influence_is_the_score_of_an_example_for_itself() -> None:
    task, train, _ = wide_task()
    fitted = fb.EKFAC(rank=None).fit(task, train)
    some = (train[0][:40], train[1][:40])
    assert torch.allclose(
        fitted.self_influence()[:40], fitted.score(some).values.diagonal(), rtol=1e-9
    )


def test_large_damping_turns_influence_into_graddot() -> None:
    model = network()
    task = fb.Task(model, LOSS)
    graddot = fb.GradDot().fit(task, TRAIN).score(QUERIES).values
    for method in (
        fb.EKFAC(damping=fb.Absolute(1e6), rank=None),
        fb.KFAC(damping=fb.Absolute(1e6), rank=None),
        fb.Exact(damping=fb.Absolute(1e6)),
    ):
        scores = method.fit(task, TRAIN).score(QUERIES).values
        assert torch.allclose(scores * 1e6 * N, graddot, rtol=1e-4, atol=1e-5)


def test_horizon_damping_is_one_over_rate_times_steps() -> None:
    task = fb.Task(network(), LOSS)
    fitted = fb.Exact(damping=fb.Horizon(0.1, 50)).fit(task, TRAIN)
    assert fitted.details()["damping_used"] == {"all": pytest.approx(0.2)}


def test_parts_compose_in_ways_nobody_named() -> None:
    """Cosines in the metric of the empirical Fisher of the model output."""
    model = network()
    method = fb.Influence(
        name="mine", gradient="output", curvature=Dense(kind="fisher"), normalise="cosine"
    )
    scores = method.fit(fb.Task(model, LOSS), TRAIN).score(QUERIES).values
    weights = 1 - model(TRAIN[0]).softmax(1).detach().gather(1, TRAIN[1][:, None])[:, 0]
    q_weights = 1 - model(QUERIES[0]).softmax(1).detach().gather(1, QUERIES[1][:, None])[:, 0]
    z = -flat(model, TRAIN) / weights[:, None]
    q = -flat(model, QUERIES) / q_weights[:, None]
    metric = z.T @ z / N
    metric += 0.1 * metric.trace() / len(metric) * torch.eye(len(metric)).double()
    inverse = torch.linalg.inv(metric)
    lengths = (q @ inverse * q).sum(1).sqrt()[:, None] * (z @ inverse * z).sum(1).sqrt()
    assert torch.allclose(scores, q @ inverse @ z.T / lengths * weights, rtol=1e-7)


def test_kronecker_factors_ignore_padding_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Tanh()).double().eval()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        hidden = model(batch["ids"]) * batch["mask"][:, :, None]
        return hidden.sum((1, 2)).square()

    ids = torch.randint(9, (20, 5))
    short = {"ids": ids, "mask": torch.ones(20, 5)}
    padded = {
        "ids": torch.cat([ids, torch.zeros(20, 3, dtype=torch.long)], 1),
        "mask": torch.cat([torch.ones(20, 5), torch.zeros(20, 3)], 1),
    }
    task = fb.Task(model, loss)
    method = fb.Influence(curvature=Kronecker(targets="empirical"), units="removal")
    one = method.fit(task, short).score(short).values
    other = method.fit(task, padded).score(padded).values
    assert torch.allclose(one, other, rtol=1e-9)
    assert np.isfinite(one.numpy()).all()
