"""Exact influence against models that were really refitted without an example."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F

import forebear as fb
from forebear.training.subsets import leave_one_out_subsets

L2 = 0.1
TEST = 20
LEFT_OUT = np.arange(0, 480, 12)  # 40 of the training examples


def standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / x.std(0)


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Breast cancer: training inputs and labels, test inputs and labels."""
    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = standardised(x)[order], y[order].astype(np.float64)
    return x[:-TEST], y[:-TEST], x[-TEST:], y[-TEST:]


def newton(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights, then the bias, of logistic regression with a ridge of `L2` on all of them."""
    x = np.column_stack([x, np.ones(len(x))])
    theta = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ theta))
        gradient = x.T @ (p - y) / len(x) + L2 * theta
        hessian = (x.T * (p * (1 - p))) @ x / len(x) + L2 * np.eye(len(theta))
        theta = theta - np.linalg.solve(hessian, gradient)
        if np.abs(gradient).max() < 1e-14:
            return theta
    raise AssertionError("Newton's method did not converge")


def held_out_loss(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, -(2 * y - 1) * (x @ theta[:-1] + theta[-1]))


def linear(theta: np.ndarray) -> nn.Module:
    model = nn.Linear(len(theta) - 1, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(theta[None, :-1]))
        model.bias.fill_(theta[-1])
    return model


def logistic(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])[:, 0]
    return F.binary_cross_entropy_with_logits(logits, batch[1], reduction="none")


def ridged(model: nn.Module, batch: Any) -> Tensor:
    """The regulariser belongs to every example's loss, so that the mean loss has it once."""
    return logistic(model, batch) + 0.5 * L2 * sum(p.square().sum() for p in model.parameters())


def minus_logistic(model: nn.Module, batch: Any) -> Tensor:
    return -logistic(model, batch)


def tensors(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(x), torch.from_numpy(y)


def test_logistic_regression_loses_what_the_scores_say() -> None:
    x, y, test_x, test_y = split()
    theta = newton(x, y)
    task = fb.Task(linear(theta), ridged, measure=minus_logistic)
    fitted = fb.Exact(damping=fb.Absolute(0.0)).fit(task, tensors(x, y))
    assert fitted.coverage == 1.0  # no hook sees the regulariser: the fallback does
    scores = fitted.score(tensors(test_x, test_y))
    assert scores.provenance.units == "removal"
    with_it = -held_out_loss(theta, test_x, test_y)
    effects = []
    for i in LEFT_OUT:
        keep = np.arange(len(x)) != i
        effects.append(with_it + held_out_loss(newton(x[keep], y[keep]), test_x, test_y))
    refitted, foretold = np.stack(effects, 1), scores.values[:, LEFT_OUT].numpy()  # [q, 40]
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(foretold, refitted, strict=True)]
    assert min(correlations) >= 0.99
    slopes = (foretold * refitted).sum(1) / np.square(foretold).sum(1)
    assert np.abs(slopes - 1).max() < 0.05


def test_the_library_measures_the_same_agreement_by_itself() -> None:
    x, y, test_x, test_y = split()
    x, y = x[:120], y[:120]

    def refit(subset: Tensor, seed: int) -> nn.Module:
        rows = subset.numpy()
        return linear(newton(x[rows], y[rows]))

    model, train, queries = linear(newton(x, y)), tensors(x, y), tensors(test_x, test_y)
    rows = range(0, 120, 6)
    truth = fb.GroundTruth.collect(
        refit,
        train,
        queries,
        subsets=leave_one_out_subsets(120, rows),
        seeds=1,
        measure=minus_logistic,
        model=model,
    )
    task = fb.Task(model, ridged, measure=minus_logistic)
    scores = fb.attribute(task, train, queries, "exact", damping=fb.Absolute(0.0))
    found = fb.evaluate(scores, truth)
    assert found["loo_correlation"].mean > 0.99
    assert "ceiling" not in found  # one seed says nothing about noise
    assert found["per_query"].shape == (TEST,)


def test_least_squares_has_a_closed_form() -> None:
    """The prediction changes by the influence over `1 − h`, with h the example's leverage."""
    x, y = load_diabetes(return_X_y=True)
    x, y = standardised(x), standardised(y)
    x, y, test_x = x[:200], y[:200], x[200:210]
    design = np.column_stack([x, np.ones(len(x))])
    theta = np.linalg.solve(design.T @ design, design.T @ y)
    task = fb.Task(
        linear(theta), fb.losses.squared_error, measure=lambda model, batch: model(batch[0])[:, 0]
    )
    train, queries = tensors(x, y), tensors(test_x, np.zeros(len(test_x)))
    leverage = np.einsum("ij,ji->i", design, np.linalg.solve(design.T @ design, design.T))
    effects = np.empty((len(test_x), len(x)))
    for i in range(len(x)):
        keep = np.arange(len(x)) != i
        without = np.linalg.lstsq(design[keep], y[keep], rcond=None)[0]
        effects[:, i] = np.column_stack([test_x, np.ones(len(test_x))]) @ (theta - without)
    for kind in ("hessian", "gauss_newton"):  # the same matrix for a linear model
        method = fb.Exact(curvature=kind, damping=fb.Absolute(0.0))
        scores = method.fit(task, train).score(queries).values.numpy()
        np.testing.assert_allclose(scores / (1 - leverage), effects, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("l2", [0.1, 1.0])
def test_a_damped_least_squares_is_ridge_regression(l2: float) -> None:
    """Absolute damping is in units of the mean loss: λ is the ridge of the mean squared error."""
    x, y = load_diabetes(return_X_y=True)
    x, y = standardised(x)[:100], standardised(y)[:100]
    model = nn.Linear(10, 1, bias=False).double()
    theta = np.linalg.solve(x.T @ x / 100 + l2 * np.eye(10), x.T @ y / 100)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(theta[None]))
    method = fb.Exact(curvature="gauss_newton", damping=fb.Absolute(l2))
    scores = method.fit(fb.Task(model, fb.losses.squared_error), tensors(x, y)).score(
        tensors(x[:5], y[:5])
    )
    residual = x @ theta - y
    expected = (x[:5] * residual[:5, None]) @ np.linalg.solve(
        x.T @ x / 100 + l2 * np.eye(10), (x * residual[:, None]).T
    )
    np.testing.assert_allclose(scores.values.numpy(), expected / 100, rtol=1e-9, atol=1e-14)
