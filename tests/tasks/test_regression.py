"""Regression: half the squared error, and targets with unit variance around the prediction."""

import pytest
import torch
from torch import nn

import forebear as fb

LOSS = fb.losses.squared_error
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def model(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, outputs).double()


def targets(outputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, outputs, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_loss_is_half_of_torchs_sum(outputs: int) -> None:
    y = targets(outputs)
    expected = [
        0.5 * nn.functional.mse_loss(model(outputs)(X[i]), y[i], reduction="sum").item()
        for i in range(6)
    ]
    assert LOSS(model(outputs), (X, y)).tolist() == pytest.approx(expected, rel=1e-12)


def test_one_output_may_be_a_vector_on_either_side() -> None:
    y = targets(1)
    expected = LOSS(model(1), (X, y))
    assert torch.equal(LOSS(model(1), (X, y[:, 0])), expected)
    flat = nn.Sequential(model(1), nn.Flatten(0))
    assert torch.equal(LOSS(flat, (X, y)), expected)
    assert torch.equal(LOSS(flat, (X, y[:, 0].float())), LOSS(flat, (X, y.float())))


def test_nothing_is_broadcast() -> None:
    with pytest.raises(fb.errors.TaskError, match=r"shape \(6, 3\) and targets \(6, 1\)"):
        LOSS(model(3), (X, targets(1)))


def test_sampled_targets_are_gaussian_around_the_prediction() -> None:
    draws = 20_000
    outputs = torch.tensor([[1.0, -2.0]]).expand(draws, 2)
    batch = (torch.zeros(draws, 4), torch.zeros(draws, 2))
    y, weights = LOSS.sample(outputs, batch, torch.Generator().manual_seed(0))
    assert (weights == 1).all()
    error = 5 / draws**0.5
    assert (y.mean(0) - outputs[0]).abs().max() < error
    assert (torch.cov(y.T) - torch.eye(2)).abs().max() < 2 * error


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_gradient_is_minus_the_weight_times_that_of_the_link(outputs: int) -> None:
    """`∇ℓ = −weight · ∇f`, the identity that TRAK's residual weights stand for."""
    mine, y = model(outputs), targets(outputs)
    parameters = list(mine.parameters())
    for i in range(6):
        batch = (X[i : i + 1], y[i : i + 1])
        output, weight = LOSS.link(mine, batch)
        of_link = torch.autograd.grad(output.sum(), parameters)
        of_loss = torch.autograd.grad(LOSS(mine, batch).sum(), parameters)
        for a, b in zip(of_link, of_loss, strict=True):
            assert torch.allclose(-weight * a, b, rtol=1e-10, atol=1e-14)


def test_a_perfect_prediction_has_a_finite_link() -> None:
    mine = model(2)
    output, weight = LOSS.link(mine, (X, mine(X).detach()))
    assert torch.isfinite(output).all()
    assert weight.tolist() == [0.0] * 6
