"""DataInf against its formula as a loop over training examples."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import forebear as fb
from forebear.curvature import DataInf, Dense
from forebear.curvature.datainf import combined
from forebear.gradients import materialise
from tests.oracles import gradients_one_at_a_time

LOSS = fb.losses.cross_entropy


class Words(nn.Module):
    """An embedding, a convolution over it, and linear layers with and without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(9, 4), nn.Linear(4, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.words(ids)).tanh()).mean(1))


LAYERS = {"words": ("weight",), "mix": ("weight", "bias"), "norm": ("weight", "bias")}
LAYERS["head"] = ("weight", "bias")


def words(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(9, (n, 5)), torch.randint(3, (n,))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3)).double().eval()


def rows(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6).double(), torch.randint(3, (n,))


def by_layer(model: nn.Module, batch: tuple[Tensor, Tensor], layers: Any) -> list[Tensor]:
    grads = gradients_one_at_a_time(model, LOSS, batch)
    return [
        torch.cat([grads[f"{layer}.{part}"].flatten(1) for part in parts], 1)
        for layer, parts in layers.items()
    ]


def looped(queries: list[Tensor], train: list[Tensor], dampings: list[float]) -> Tensor:
    """Equation of Kwon et al. as it stands: for each query, layer and training example k."""
    out = torch.zeros(len(queries[0]), len(train[0])).double()
    for q in range(len(out)):
        for v, g, damping in zip((x[q] for x in queries), train, dampings, strict=True):
            solved = torch.zeros_like(v)
            for one in g:
                solved += v - one * (one @ v) / (damping + one @ one)
            out[q] += g @ solved / damping / len(g)
    return out / len(train[0])


CASES = {
    "words": (lambda: Words().double().eval(), words, LAYERS),
    "network": (network, rows, {"0": ("weight", "bias"), "2": ("weight", "bias")}),
}


@pytest.mark.parametrize("queries", [2, 40], ids=["few queries", "many queries"])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_loop(name: str, queries: int) -> None:
    """Few queries are solved for, many meet Gram matrices: both are the formula."""
    torch.manual_seed(0)
    make, draw, layers = CASES[name]
    model, train, asked = make(), draw(13), draw(queries)
    g = by_layer(model, train, layers)
    dampings = [0.1 * x.square().mean().item() for x in g]
    expected = looped(by_layer(model, asked, layers), g, dampings)
    fitted = fb.DataInf().fit(fb.Task(model, LOSS), train, batch_size=5)
    assert torch.allclose(fitted.score(asked).values, expected, rtol=1e-10, atol=1e-13)
    own = looped(g, g, dampings).diagonal()
    assert torch.allclose(fitted.self_influence(), own, rtol=1e-10)
    assert list(fitted.details()["damping_used"].values()) == pytest.approx(dampings, rel=1e-10)


def test_both_ways_to_the_queries_are_met() -> None:
    """Which one is taken goes by cost: the case above must see each."""
    torch.manual_seed(0)
    task = fb.Task(network(), LOSS)
    fitted = fb.DataInf().fit(task, rows(13))
    for queries, solved in ((1, True), (400, False)):
        ready, _ = fitted._prepare(0, fb.Data.of(rows(queries)))
        assert next(iter(ready.values())).weights is None or not solved
        assert all(block.weights is not None for block in ready.values()) or solved


def test_in_single_precision_the_loop_is_met_too() -> None:
    torch.manual_seed(0)
    model = network()
    train, asked = rows(30), rows(6)
    layers = CASES["network"][2]
    g = by_layer(model, train, layers)
    expected = looped(
        by_layer(model, asked, layers), g, [0.1 * x.square().mean().item() for x in g]
    )
    narrow = [(x.float(), y) for x, y in (train, asked)]
    scores = fb.DataInf().fit(fb.Task(model.float(), LOSS), narrow[0]).score(narrow[1]).values
    assert (scores - expected).norm() / expected.norm() < 1e-6


def whole(curvature: Any, train: Any, damping: float, kind: str = "fisher") -> Tensor:
    """What the curvature makes of the identity, `[P, P]`, with one layer only."""
    method = fb.Influence(curvature=curvature, damping=fb.Absolute(damping))
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 3)).double()
    fitted = method.fit(fb.Task(model, LOSS), train)
    size = sum(block.size for block in fitted.plan.blocks.values())
    return fitted.curvatures[0].solve(torch.eye(size).double())


def test_it_is_never_below_the_inverse_it_stands_for() -> None:
    """The inverse of positive matrices is operator convex: mean of inverses ⪰ inverse of mean."""
    torch.manual_seed(0)
    train = rows(25)
    exact = whole(Dense(kind="fisher"), train, 0.01)
    mean = whole(DataInf(), train, 0.01)
    values = torch.linalg.eigvalsh(mean - exact)
    assert values[0] > -1e-9 * values[-1]
    assert values[-1] > 0.1 * exact.norm()


def test_with_one_example_it_is_exact() -> None:
    torch.manual_seed(0)
    train = rows(1)
    exact = whole(Dense(kind="fisher"), train, 0.01)
    assert torch.allclose(whole(DataInf(), train, 0.01), exact, rtol=1e-10, atol=1e-10)


def test_it_is_exact_in_the_limit_of_large_damping() -> None:
    torch.manual_seed(0)
    train, errors = rows(25), []
    for damping in (1.0, 100.0, 10_000.0):
        exact = whole(Dense(kind="fisher"), train, damping)
        errors.append(((whole(DataInf(), train, damping) - exact).norm() / exact.norm()).item())
    assert errors[0] > 0.1
    assert errors[1] < errors[0] / 50
    assert errors[2] < errors[1] / 50  # of second order in the gradients' size over λ


def test_a_sample_of_examples_makes_up_the_curvature() -> None:
    torch.manual_seed(0)
    model, train, asked = network(), rows(40), rows(5)
    task = fb.Task(model, LOSS)
    fitted = fb.DataInf(samples=10, seed=4).fit(task, train, batch_size=7)
    chosen = fitted.curvatures[0].chosen
    assert len(set(chosen.tolist())) == 10
    layers = CASES["network"][2]
    g, q = by_layer(model, train, layers), by_layer(model, asked, layers)
    expected = torch.zeros(5, 40).double()
    for v, one in zip(q, g, strict=True):
        damping = 0.1 * one.square().mean()  # of all examples
        kept = one[chosen]
        inverse = torch.eye(one.shape[1]).double() - torch.einsum(
            "ki,kj,k->ij", kept, kept, 0.1 / (damping + kept.square().sum(1))
        )
        expected += v @ inverse @ one.T / damping / 40
    assert torch.allclose(fitted.score(asked).values, expected, rtol=1e-9, atol=1e-13)
    again = fb.DataInf(samples=10, seed=4).fit(task, train)
    assert torch.equal(again.curvatures[0].chosen, chosen)
    other = fb.DataInf(samples=10, seed=5).fit(task, train)
    assert not torch.equal(other.curvatures[0].chosen, chosen)


def test_zero_damping_is_refused() -> None:
    with pytest.raises(fb.errors.TaskError, match=r"block '0' has damping zero.*fb\.Absolute"):
        fb.DataInf(damping=0.0).fit(fb.Task(network(), LOSS), rows(5))


def test_rules_about_eigenvalues_are_refused() -> None:
    with pytest.raises(fb.errors.TaskError, match="does not know"):
        fb.DataInf(damping=fb.Horizon(0.1, 5, exact=True)).fit(fb.Task(network(), LOSS), rows(5))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_combined_gradients_are_the_sum_of_written_out_ones(
    examples: int, positions: int, left: int, right: int
) -> None:
    from forebear.blocks import Block
    from forebear.layers import Factors

    size = torch.Size([left, right])
    block = Block("b", left, right, ("b",), (size,))
    weights = torch.randn(3, examples).double()
    sides = torch.randn(examples, positions, left), torch.randn(examples, positions, right)
    hot = torch.randint(left, (examples, positions))
    for one in (sides[0].double(), hot):
        terms = [Factors(one, sides[1].double())]
        expected = weights @ materialise(terms, block).flatten(1)
        assert torch.allclose(combined(weights, terms, block), expected, rtol=1e-10, atol=1e-12)


def test_regression_is_scored_as_its_loop() -> None:
    """Squared error with several layers of one position, and a plain loss at that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 1)).double()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0])[:, 0], batch[1], reduction="none")

    train, asked = ((torch.randn(n, 6).double(), torch.randn(n).double()) for n in (20, 9))
    grads = [gradients_one_at_a_time(model, loss, b) for b in (asked, train)]
    q, g = (
        [torch.cat([x[f"{k}.weight"].flatten(1), x[f"{k}.bias"]], 1) for k in ("0", "2")]
        for x in grads
    )
    expected = looped(q, g, [0.1 * x.square().mean().item() for x in g])
    scores = fb.DataInf().fit(fb.Task(model, loss), train).score(asked).values
    assert torch.allclose(scores, expected, rtol=1e-10, atol=1e-13)
