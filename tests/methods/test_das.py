"""The diffusion attribution score: squared, weighted with residuals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import forebear as fb
from forebear.types import UNSIGNED
from tests.denoising_cases import LEVELS, SCALARS, N, case, features, kernel


def residuals(task: fb.Task, train: dict) -> Tensor:
    """By numpy, from losses of single levels and draws."""
    loss: Any = task.objective
    with torch.no_grad():
        outputs = loss.outputs(task.model, train)
        roots = np.sqrt(loss.errors(outputs, train).numpy())
    return torch.tensor((roots / np.sqrt((roots**2).sum(1, keepdims=True))).mean(1))


@pytest.mark.parametrize("form", ["squared", "linear"])
def test_scores_are_the_formula(form: Any) -> None:
    task, train, queries = case()
    fitted = fb.DAS(form=form).fit(task, train)
    told, asked = (features(task, data, SCALARS["mean"], unit=True) for data in (train, queries))
    expected = kernel(asked, told) * residuals(task, train)
    own = kernel(told, told).diagonal() * residuals(task, train)
    if form == "squared":
        expected, own = expected.square(), own.square()
    torch.testing.assert_close(fitted.score(queries).values, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fitted.self_influence(), own, rtol=1e-9, atol=1e-12)


def test_residuals_lie_between_one_level_and_all() -> None:
    task, train, _ = case()
    fitted = fb.DAS().fit(task, train, batch_size=4)
    torch.testing.assert_close(fitted.residuals, residuals(task, train))
    count = 2 * len(LEVELS)
    assert (fitted.residuals >= 1 / count).all()
    assert (fitted.residuals <= count**-0.5 + 1e-12).all()


def test_squared_scores_have_no_opponents() -> None:
    task, train, queries = case()
    fitted = fb.DAS().fit(task, train)
    scores = fitted.score(queries)
    assert scores.provenance.sign == UNSIGNED
    for ask in (fitted.top, lambda _, **k: scores.top(**k)):
        with pytest.raises(fb.errors.TaskError, match="squares its scores"):
            ask(queries, k=3, opponents=True)
    assert (fitted.top(queries, k=5).ids == scores.top(5).ids).all()
    linear = fb.DAS(form="linear").fit(task, train)
    assert linear.top(queries, k=3, opponents=True).ids.shape == (4, 3)
    assert linear.score(queries).provenance.sign != UNSIGNED


def test_batches_change_no_score() -> None:
    task, train, queries = case()
    whole = fb.DAS().fit(task, train)
    small = fb.DAS().fit(task, train, batch_size=3)
    expected = whole.score(queries).values
    torch.testing.assert_close(small.score(queries).values, expected, rtol=1e-9, atol=1e-14)


def test_restricted_it_gives_the_same_scores_for_these_examples() -> None:
    task, train, queries = case()
    fitted = fb.DAS().fit(task, train)
    positions = torch.tensor([1, 4, 9])
    part = fitted.restricted(positions)
    expected = fitted.score(queries).values[:, positions]
    torch.testing.assert_close(part.score(queries).values, expected)
    torch.testing.assert_close(part.self_influence(), fitted.self_influence()[positions])


def test_elsewhere_it_is_squared_once() -> None:
    task, train, queries = case()
    here, there = fb.DAS().fit(task, train), None
    there = here.on(fb.Processes(1))
    torch.testing.assert_close(there.score(queries).values, here.score(queries).values)
    torch.testing.assert_close(there.self_influence(), here.self_influence())


def test_another_ridge_keeps_the_residuals() -> None:
    task, train, queries = case()
    again = fb.DAS().fit(task, train).with_damping(0.3)
    expected = fb.DAS(damping=0.3).fit(task, train).score(queries).values
    torch.testing.assert_close(again.score(queries).values, expected, rtol=1e-8, atol=1e-14)


def test_saved_and_loaded_it_gives_the_same_scores(tmp_path: Path) -> None:
    task, train, queries = case()
    fitted = fb.DAS(dimension=20, form="linear").fit(task, train)
    fitted.save(tmp_path)
    loaded = fb.load(tmp_path, task, train)
    assert loaded.method == replace(fitted.method)
    torch.testing.assert_close(loaded.score(queries).values, fitted.score(queries).values)
    torch.testing.assert_close(loaded.self_influence(), fitted.self_influence())


def test_it_cannot_be_stored_as_products_of_vectors(tmp_path: Path) -> None:
    task, train, _ = case()
    with pytest.raises(fb.errors.TaskError, match="no vector for each example"):
        fb.build_store(fb.DAS(dimension=20), task, train, tmp_path)


def test_an_example_that_is_not_finite_is_named() -> None:
    task, train, _ = case()
    train["image"][7] = float("nan")
    ids = [f"image-{i}" for i in range(N)]
    with pytest.raises(fb.errors.NonFiniteError, match="image-7"):
        fb.DAS().fit(task, train, ids=ids)
