"""Classification: the loss is torch's, and sampled labels follow the prediction."""

import math

import pytest
import torch
from torch import Tensor, nn

import forebear as fb

LOSS = fb.losses.cross_entropy


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def test_the_loss_is_that_of_each_example() -> None:
    logits = model()(X)
    expected = [nn.functional.cross_entropy(logits[i], Y[i]).item() for i in range(6)]
    assert LOSS(model(), (X, Y)).tolist() == pytest.approx(expected, rel=1e-12)


def test_sampled_labels_and_weights_stand_for_the_prediction() -> None:
    """Squared weights make up for labels drawn from another distribution than the model's."""
    draws = 20_000
    logits = torch.tensor([[0.0, 1.0, -1.0], [-2.0, 0.0, 2.0]])
    generator = torch.Generator().manual_seed(0)
    for row in logits:
        batch = (torch.zeros(draws, 4), torch.zeros(draws, dtype=torch.long))
        labels, weights = LOSS.sample(row.expand(draws, 3), batch, generator)
        counted = weights.square()[:, None] * nn.functional.one_hot(labels, 3)  # [draws, 3]
        # Five standard deviations of a mean of so many draws.
        allowed = 5 * counted.std(0) / draws**0.5
        assert ((counted.mean(0) - row.softmax(0)).abs() < allowed).all()


def test_sampled_losses_have_the_fisher_matrix_of_the_prediction() -> None:
    """The mean squared gradient in the logits is `diag(p) − p pᵀ`."""
    draws = 4000
    x = X[:1].expand(draws, 4)
    logits = model()(x).detach().requires_grad_()

    class Given(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return logits

    generator = torch.Generator().manual_seed(0)
    losses = LOSS.sampled(Given(), (x, Y[:1].expand(draws)), generator)
    (g,) = torch.autograd.grad(losses.sum(), logits)
    p = logits[0].detach().softmax(0)
    assert torch.allclose(g.T @ g / draws, torch.diag(p) - torch.outer(p, p), atol=0.03)


def test_the_link_is_the_log_odds_of_the_given_label() -> None:
    output, weight = LOSS.link(model(), (X, Y))
    p = model()(X).softmax(1).gather(1, Y[:, None])[:, 0]
    assert torch.allclose(output, (p / (1 - p)).log(), rtol=1e-10)
    assert torch.allclose(weight, 1 - p, rtol=1e-10)
    assert not weight.requires_grad


def test_the_link_stays_finite_for_a_certain_prediction() -> None:
    class Certain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[200.0, 0.0, 0.0]], dtype=torch.float64).requires_grad_()

    output, weight = LOSS.link(Certain(), (X[:1], Y[:1]))
    assert math.isfinite(output.item())
    assert 0 <= weight.item() < 1e-12


def test_an_output_that_is_not_finite_is_refused_before_sampling() -> None:
    broken = model()
    nn.init.constant_(broken.get_parameter("bias"), float("nan"))
    with pytest.raises(fb.errors.NonFiniteError, match="model's output"):
        LOSS.sampled(broken, (X, Y), torch.Generator().manual_seed(0))
