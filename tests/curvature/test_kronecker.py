"""EK-FAC and K-FAC on layers with positions, against matrices written out here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import forebear as fb
from forebear.curvature import Kronecker
from tests.oracles import gradients_one_at_a_time

N, Q, DAMPING = 30, 5, 0.1

Parts = dict[str, tuple[Tensor, Tensor]]
"""Weight matrix of a layer to what comes in and the gradient of what goes out, `[b, t, ...]`."""


class OverSequences(nn.Module):
    """Two linear layers applied to every position."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh()).mean(1)

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"one": with_ones(x), "two": self.one(x).tanh()}


class Convolutional(nn.Module):
    """A convolution over images and a linear layer over the places it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh().flatten(2).mT).mean(1)

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        patches = F.unfold(x, 3, stride=2, padding=1).mT  # [b, t, c * k * k]
        return {
            "one": with_ones(patches),
            "two": with_ones(self.one(x).tanh().flatten(2).mT),
        }


class Words(nn.Module):
    """An embedding, whose inputs are one-hot."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.two(self.one(ids).tanh()).mean(1)

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        return {"one": F.one_hot(ids, 7).double(), "two": with_ones(self.one(ids).tanh())}


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 3, 4, dtype=torch.float64)


def pictures(n: int) -> Tensor:
    return torch.randn(n, 2, 5, 5, dtype=torch.float64)


def words(n: int) -> Tensor:
    return torch.randint(7, (n, 4))


CASES: dict[str, tuple[type, Callable[[int], Tensor]]] = {
    "linear over sequences": (OverSequences, sequences),
    "convolution": (Convolutional, pictures),
    "embedding": (Words, words),
}


def case(name: str) -> tuple[Any, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(4)
    make, draw = CASES[name]
    model = make().double().eval()
    x, y = draw(N + Q), torch.randint(3, (N + Q,))
    return model, (x[:N], y[:N]), (x[N:], y[N:])


def out_gradients(model: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradient of each example's loss at the output of both layers, `[b, t, o]`."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output)
        )
        for name in ("one", "two")
    ]
    loss = F.cross_entropy(model(x), y, reduction="sum")
    for handle in handles:
        handle.remove()
    grads = dict(zip(seen, torch.autograd.grad(loss, list(seen.values())), strict=True))
    return {name: g.flatten(2).mT if g.ndim == 4 else g for name, g in grads.items()}


def factors(name: str, model: Any, batch: tuple[Tensor, Tensor]) -> Parts:
    """Left and right factors of each layer's gradient, for an embedding as its rows are stored."""
    inputs, grads = model.inputs(batch[0]), out_gradients(model, *batch)
    parts = {layer: (grads[layer], inputs[layer].detach()) for layer in ("one", "two")}
    if name == "embedding":
        parts["one"] = parts["one"][::-1]
    return parts


def basis(name: str, layer: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the moments; the rows of an embedding are a basis as they are."""
    right_moment = torch.einsum("bti,btj->ij", right, right)
    if name == "embedding" and layer == "one":
        return torch.eye(7, dtype=torch.float64), torch.linalg.eigh(right_moment)[1]
    left_moment = torch.einsum("bti,btj->ij", left, left)
    return torch.linalg.eigh(left_moment)[1], torch.linalg.eigh(right_moment)[1]


def dense(name: str, corrected: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Eigenvalues by layer, scores `[q, n]` and self-influence `[n]`, empirical targets."""
    model, train, queries = case(name)
    q_parts, z_parts = factors(name, model, queries), factors(name, model, train)
    eigenvalues, scores, own = {}, torch.zeros(Q, N).double(), torch.zeros(N).double()
    for layer, (left, right) in z_parts.items():
        u, v = basis(name, layer, left, right)
        grads = torch.einsum("bti,btj->bij", left, right)
        of_queries = torch.einsum("bti,btj->bij", *q_parts[layer])
        if corrected:
            values = (u.T @ grads @ v).square().mean(0)
        else:
            of_left = torch.einsum("bti,ik->btk", left, u).square().sum((0, 1)) / N
            of_right = torch.einsum("bti,ik->btk", right, v).square().mean((0, 1))
            values = torch.outer(of_left, of_right)
        eigenvalues[layer] = values
        vectors = torch.kron(u.contiguous(), v.contiguous())
        damping = DAMPING * values.mean()
        matrix = vectors @ torch.diag(values.flatten() + damping) @ vectors.T
        solved = torch.linalg.solve(matrix, grads.flatten(1).T)  # [p, n]
        scores += of_queries.flatten(1) @ solved / N
        own += (grads.flatten(1) * solved.T).sum(1) / N
    return eigenvalues, scores, own


def fitted_block(fitted: Any, layer: str) -> Any:
    return next(
        block
        for name, block in fitted.curvatures[0].blocks.items()
        if name.removesuffix(".weight") == layer
    )


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_has_the_gradients_of_autograd(name: str) -> None:
    model, train, _ = case(name)
    grads = gradients_one_at_a_time(model, fb.losses.cross_entropy, train)
    for layer, (left, right) in factors(name, model, train).items():
        written = torch.einsum("bti,btj->bij", left, right)
        weight = grads[f"{layer}.weight"].flatten(2)
        assert torch.allclose(written[:, :, : weight.shape[2]], weight, rtol=1e-9, atol=1e-14)
        if f"{layer}.bias" in grads:
            assert torch.allclose(written[:, :, -1], grads[f"{layer}.bias"], atol=1e-14)


@pytest.mark.parametrize("corrected", [True, False], ids=["ekfac", "kfac"])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_dense_construction(name: str, corrected: bool) -> None:
    model, train, queries = case(name)
    make = fb.EKFAC if corrected else fb.KFAC
    fitted = make(targets="empirical", rank=None, damping=DAMPING).fit(
        fb.Task(model, fb.losses.cross_entropy), train, batch_size=7
    )
    eigenvalues, scores, own = dense(name, corrected)
    for layer, expected in eigenvalues.items():
        found = fitted_block(fitted, layer)
        assert torch.allclose(found.eigenvalues, expected, rtol=1e-7, atol=1e-15)
        assert found.damping == pytest.approx(DAMPING * expected.mean().item(), rel=1e-7)
    assert torch.allclose(fitted.score(queries).values, scores, rtol=1e-7, atol=1e-13)
    assert torch.allclose(fitted.self_influence(), own, rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("positions", [1, 2])
def test_the_low_rank_inverse_approaches_the_exact_one(positions: int) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 8)).double().eval()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none")

    x = torch.randn(220, positions, 40, dtype=torch.float64) * torch.logspace(0, -2, 40).double()
    y = torch.randint(8, (220,))
    task, train, queries = fb.Task(layers, loss), (x[:200], y[:200]), (x[200:], y[200:])
    exact = fb.EKFAC(rank=None, targets="empirical").fit(task, train).score(queries).values
    errors = []
    for tolerance in (0.5, 0.1, 0.01):
        method = fb.EKFAC(rank=60, tolerance=tolerance, targets="empirical")
        scores = method.fit(task, train).score(queries).values
        errors.append(((scores - exact).norm() / exact.norm()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_rows_of_an_embedding_that_no_example_met_have_no_curvature() -> None:
    model, (ids, y), queries = case("embedding")
    ids = ids.clamp_max(4)
    task = fb.Task(model, fb.losses.cross_entropy, layers="one")
    method = fb.EKFAC(targets="empirical", damping=fb.Absolute(0.01))
    fitted = method.fit(task, (ids, y))
    assert (fitted_block(fitted, "one").eigenvalues[5:] == 0).all()
    assert (fitted_block(fitted, "one").eigenvalues[:5] > 0).any(1).all()
    never = torch.tensor([[5, 6, 5, 6]])
    assert (fitted.score((never, queries[1][:1])).values == 0).all()


def test_sampled_targets_are_the_same_for_the_same_seed() -> None:
    model, train, queries = case("linear over sequences")
    task = fb.Task(model, fb.losses.cross_entropy)
    one, again, other = (
        fb.EKFAC(seed=seed).fit(task, train).score(queries).values for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_block_without_curvature_or_damping_is_refused() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + 0 * self.idle(x)

    torch.manual_seed(0)
    model = Silent().double()
    train = (torch.randn(30, 4).double(), torch.randint(3, (30,)))
    task = fb.Task(model, fb.losses.cross_entropy)
    with pytest.raises(fb.errors.TaskError, match="'idle' has no curvature"):
        fb.EKFAC(damping=0.1).fit(task, train)
    fitted = fb.EKFAC(damping=fb.Absolute(0.1), rank=None).fit(task, train)
    assert torch.isfinite(fitted.score(train).values).all()


def test_methods_of_one_registered_name_are_the_same_configuration() -> None:
    assert fb.get("ekfac") == fb.EKFAC()
    assert fb.EKFAC(rank=None).curvature == Kronecker(corrected=True, rank=None)
    assert fb.KFAC(rank=None).curvature == Kronecker(corrected=False, rank=None)
