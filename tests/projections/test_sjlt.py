"""The sparse transform against its matrix, and the promise that inner products are kept."""

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.capture import Capture
from forebear.data import Data
from forebear.plan import make_plan
from forebear.projections import SJLT
from tests.methods.test_influence import LOSS, QUERIES, TRAIN, N, flat, network
from tests.oracles import gradients_one_at_a_time


def prepared(sparsity: int, seed: int, dimension: int = 64):
    task = fb.Task(network(), LOSS)
    plan = make_plan(task, Data(TRAIN))
    with Capture(task, plan) as capture:
        _, gradients = capture.gradients(task.losses, TRAIN)
    drawn = SJLT(dimension, sparsity).prepare(plan, seed)
    return drawn, drawn.features(gradients)


@pytest.mark.parametrize("sparsity", [1, 2, 8])
def test_features_are_a_product_with_the_sparse_matrix(sparsity: int) -> None:
    drawn, phi = prepared(sparsity, 3)
    grads = gradients_one_at_a_time(network(), LOSS, TRAIN)
    expected = torch.zeros(N, 64).double()
    for name, matrix in drawn.matrices.items():
        written = torch.cat([grads[f"{name}.weight"], grads[f"{name}.bias"][:, :, None]], 2)
        dense = matrix.to_dense().double() / sparsity**0.5
        assert ((dense != 0).sum(0) == sparsity).all()
        assert torch.allclose(dense.square().sum(0), torch.ones(()).double())
        expected += written.flatten(1) @ dense.T
    assert torch.allclose(phi, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("sparsity", [1, 4])
def test_inner_products_are_kept_in_expectation(sparsity: int) -> None:
    g = flat(network(), TRAIN)
    expected = g @ g.T
    estimates = []
    for seed in range(80):
        _, phi = prepared(sparsity, seed)
        estimates.append(phi @ phi.T)
    mean = torch.stack(estimates).mean(0)
    assert (mean - expected).norm() / expected.norm() < 0.06


def test_it_serves_trak_and_influence() -> None:
    task = fb.Task(network(), LOSS)
    scores = fb.TRAK(dimension=32, projection="sjlt", damping=0.1).fit(task, TRAIN).score(QUERIES)
    assert torch.isfinite(scores.values).all()
    wide = fb.Influence(projection=SJLT(8192, 4)).fit(task, TRAIN).score(QUERIES).values
    exact = flat(network(), QUERIES) @ flat(network(), TRAIN).T
    assert (wide - exact).norm() / exact.norm() < 0.1


def test_one_hot_gradients_are_written_out_for_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 2)).double()
    batch: tuple[Tensor, Tensor] = (torch.randint(5, (7, 4)), torch.randint(2, (7,)))
    task = fb.Task(model, LOSS)
    phi = fb.Influence(projection=SJLT(4096, 2)).fit(task, batch).score(batch).values
    g = flat(model, batch)
    assert (phi - g @ g.T).norm() / (g @ g.T).norm() < 0.1


def test_a_dimension_that_is_no_multiple_of_the_sparsity_is_refused() -> None:
    with pytest.raises(fb.errors.DataError, match="dimension 10 and sparsity 4"):
        SJLT(10, 4)
