"""The proved bound is one, and a tight one; the laws are near what comes out."""

import numpy as np
import pytest
import torch
from linear_oracles import two_classes

from forebear.errors import DataError
from forebear.removal import Factorised, LinearModel, distance_bound, laws, shift
from forebear.removal.estimators import mask_of


def problem(family: str, seed: int = 0, n: int = 200) -> LinearModel:
    x, y = two_classes(n, 4, seed)
    if family == "softmax":
        y = y + (x[:, 1] > 0.5)
    if family == "squared":
        return LinearModel.of(x, x[:, 0] + x[:, 1] ** 2, intercept=True).fitted()
    return LinearModel.of(x, y, family=family, penalty=0.3, intercept=True).fitted()


@pytest.mark.parametrize("family", ["squared", "logistic", "softmax"])
@pytest.mark.parametrize("estimator", ["influence", "rescaled", "newton_step", "newton_step_2"])
@pytest.mark.parametrize("k", [1, 10, 60])
def test_the_bound_is_never_below_the_error(family: str, estimator: str, k: int) -> None:
    model = problem(family)
    factorised = Factorised(model)
    rng = np.random.default_rng(k)
    groups = torch.as_tensor(np.stack([rng.choice(200, k, replace=False) for _ in range(8)]))
    estimate = shift(factorised, groups, estimator)
    left = shift(factorised, groups, "exact") - estimate
    bound = distance_bound(model, estimate, mask_of(groups, 200))
    assert (left.norm(dim=1) <= bound.distance * (1 + 1e-6) + 1e-11).all()
    # Of every output, which is a linear function of the parameters.
    directions = model.jacobian(torch.arange(20)).flatten(0, 1)
    assert ((left @ directions.T).abs() <= bound.of_linear(directions) * (1 + 1e-6) + 1e-11).all()


@pytest.mark.parametrize("family", ["logistic", "softmax"])
def test_the_bound_on_a_newton_step_is_tight(family: str) -> None:
    model = problem(family)
    groups = torch.arange(40).view(8, 5)
    step = shift(Factorised(model), groups, "newton_step")
    real = (step - shift(Factorised(model), groups, "exact")).norm(dim=1)
    ratio = distance_bound(model, step, mask_of(groups, 200)).distance / real
    assert ratio.max() < 4


def test_for_least_squares_the_scaled_bound_is_the_error() -> None:
    model = problem("squared")
    groups = torch.arange(40).view(8, 5)
    plain = shift(Factorised(model), groups, "influence")
    left = shift(Factorised(model), groups, "exact") - plain
    kept = mask_of(groups, 200)
    bound = distance_bound(model, plain, kept)
    hessian = model.hessian_at(model.curvatures * kept[..., None, None])
    scaled = (left * (hessian @ left[..., None])[..., 0]).sum(1).sqrt()
    assert torch.allclose(scaled, bound.scaled, rtol=1e-8)


def test_an_estimate_too_far_off_has_no_bound() -> None:
    model = problem("logistic")
    kept = mask_of(torch.arange(5)[None], 200)
    far = torch.full((1, model.size), 30.0, dtype=torch.float64)
    assert torch.isinf(distance_bound(model, far, kept).distance).all()


def test_the_laws_are_within_a_factor_of_two_on_what_they_are_for() -> None:
    n, d, k = 3000, 10, 20
    errors = {"newton_step": [], "influence": []}
    for seed in range(3):
        x, y = two_classes(n, d, seed)
        factorised = Factorised(LinearModel.of(x, y).fitted())
        rng = np.random.default_rng(seed)
        groups = torch.as_tensor(np.stack([rng.choice(n, k, replace=False) for _ in range(20)]))
        exact = shift(factorised, groups, "exact")
        for name, found in errors.items():
            distance = (shift(factorised, groups, name) - exact).norm(dim=1).mean()
            found.append(distance.item())
    for name, found in errors.items():
        assert 0.5 < np.mean(found) / laws(n, d, k)[name] < 2


@pytest.mark.parametrize(("n", "d", "k"), [(10, 2, 10), (10, 2, 0), (10, 0, 1)])
def test_laws_of_impossible_sizes_are_refused(n: int, d: int, k: int) -> None:
    with pytest.raises(DataError, match="k must be from 1"):
        laws(n, d, k)
