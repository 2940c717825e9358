"""Two-sided projections against written-out Kronecker products, and exact where they are square."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.capture import Capture
from forebear.curvature import Dense, Kronecker
from forebear.data import Data
from forebear.plan import make_plan
from forebear.projections import TwoSided
from tests.methods.test_influence import LOSS, QUERIES, TRAIN, N, Q, by_layer, flat, network
from tests.oracles import gradients_one_at_a_time

ALL = TwoSided(10_000)


def features(projection: TwoSided, task: fb.Task, batch: Any, seed: int = 0) -> tuple[Any, Tensor]:
    plan = make_plan(task, Data.of(batch))
    drawn = projection.prepare(plan, seed)
    with Capture(task, plan) as capture:
        _, gradients = capture.gradients(task.losses, batch)
    return drawn, drawn.features(gradients)


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian"])
def test_features_are_products_with_the_kronecker_product(kind: Any) -> None:
    drawn, phi = features(TwoSided(6, kind), fb.Task(network(), LOSS), TRAIN)
    expected = []
    for name, grads in by_layer(network(), TRAIN).items():
        both = torch.kron(drawn.left[name].contiguous(), drawn.right[name].contiguous())
        expected.append(grads.flatten(1) @ both.T)
    assert drawn.sizes == {"0": 6, "2": 6}
    assert torch.allclose(phi, torch.cat(expected, 1), rtol=1e-10, atol=1e-14)


def test_positions_tokens_and_vectors_are_projected_alike() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3), nn.LayerNorm(3)).double().eval()

    def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(batch[0]).square().cumsum(1).mean((1, 2)) * 10

    batch = (torch.randint(9, (12, 6)),)
    task = fb.Task(model, loss)
    drawn, phi = features(TwoSided(4), task, batch)
    grads = gradients_one_at_a_time(model, loss, batch)
    plan, expected = make_plan(task, Data(batch)), []
    for name, block in plan.blocks.items():
        both = torch.kron(drawn.left[name].contiguous(), drawn.right[name].contiguous())
        for i in range(12):
            written = block.matrix({p: grads[p][i] for p in block.parameters})
            expected.append(both @ written.flatten())
    sizes = list(drawn.sizes.values())
    whole = torch.cat([torch.stack(expected[k * 12 : (k + 1) * 12]) for k in range(len(sizes))], 1)
    assert torch.allclose(phi, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian"])
def test_inner_products_are_kept_in_expectation(kind: Any) -> None:
    task, estimates = fb.Task(network(), LOSS), []
    expected = flat(network(), TRAIN) @ flat(network(), TRAIN).T
    for seed in range(300):
        _, phi = features(TwoSided(9, kind), task, TRAIN, seed)
        estimates.append(phi @ phi.T)
    mean = torch.stack(estimates).mean(0)
    assert (mean - expected).norm() / expected.norm() < 0.1


def test_square_orthogonal_sides_keep_every_inner_product() -> None:
    task = fb.Task(network(), LOSS)
    scores = fb.Influence(projection=ALL).fit(task, TRAIN).score(QUERIES).values
    assert torch.allclose(scores, flat(network(), QUERIES) @ flat(network(), TRAIN).T, rtol=1e-10)


@pytest.mark.parametrize(
    "curvature",
    [Dense(kind="fisher", blocks="layers"), Kronecker(targets="empirical", corrected=False)],
    ids=["dense", "kronecker"],
)
def test_square_orthogonal_sides_give_the_exact_solve_of_each_layer(curvature: Any) -> None:
    """Projected blocks are vectors, whose second moment is the whole matrix of the layer."""
    q, z = by_layer(network(), QUERIES), by_layer(network(), TRAIN)
    expected = torch.zeros(Q, N).double()
    for name, grads in z.items():
        g = grads.flatten(1)
        matrix = g.T @ g / N
        matrix += 0.1 * matrix.trace() / len(matrix) * torch.eye(len(matrix)).double()
        expected += q[name].flatten(1) @ torch.linalg.solve(matrix, g.T) / N
    method = fb.Influence(curvature=curvature, projection=ALL, units="removal")
    fitted = method.fit(fb.Task(network(), LOSS), TRAIN)
    assert torch.allclose(fitted.score(QUERIES).values, expected, rtol=1e-7, atol=1e-11)


def test_it_can_be_saved_and_loaded(tmp_path: Any) -> None:
    task = fb.Task(network(), LOSS)
    method = fb.Influence(
        curvature=Dense(kind="fisher", blocks="layers"), projection=TwoSided(9), name="mine"
    )
    fitted = method.fit(task, TRAIN)
    fitted.save(tmp_path)
    again = fb.load(tmp_path, task, TRAIN)
    assert torch.allclose(again.score(QUERIES).values, fitted.score(QUERIES).values, rtol=1e-9)


@pytest.mark.parametrize(("dimension", "sides"), [(1, (1, 1)), (16, (4, 4)), (30, (5, 6))])
def test_sides_share_the_dimension(dimension: int, sides: tuple[int, int]) -> None:
    plan = make_plan(fb.Task(network(), LOSS), Data(TRAIN))
    block = plan.blocks["0"]  # 5 × 7
    found = TwoSided(dimension).sides(block)
    assert found == sides
    assert found[0] * found[1] <= dimension


def test_a_dimension_of_nothing_is_refused() -> None:
    with pytest.raises(fb.errors.DataError, match="must be at least 1"):
        TwoSided(0)


@pytest.mark.parametrize(
    ("curvature", "remedy"),
    [
        (Dense(), "use kind='fisher'"),
        (Dense(kind="gauss_newton"), "use kind='fisher'"),
        (fb.Exact().curvature, "use kind='fisher'"),
        (Kronecker(), "use targets='empirical'"),
    ],
)
def test_curvatures_that_need_the_model_are_refused(curvature: Any, remedy: str) -> None:
    """Kept features know nothing of targets drawn anew: empirical ones would pass for them."""
    with pytest.raises(fb.errors.TaskError, match=f"projected gradients: {remedy}"):
        fb.Influence(curvature=curvature, projection=TwoSided(9))
