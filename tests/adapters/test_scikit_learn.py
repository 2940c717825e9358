"""`fb.explain` against scikit-learn really refitted without each row."""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from linear_oracles import two_classes
from torch import nn

import forebear as fb
from forebear.errors import (
    DataError,
    MismatchError,
    MissingDependencyError,
    NumericalWarning,
    TaskError,
    UnknownNameError,
)

linear_model = pytest.importorskip("sklearn.linear_model")

N, Q = 80, 5
RNG = np.random.default_rng(0)
X = RNG.standard_normal((N, 4)) + np.array([3.0, 0, 0, -1])
NUMBERS = X[:, 0] - X[:, 1] + RNG.standard_normal(N)
TWO = np.where(X[:, 0] + RNG.standard_normal(N) > 3, "yes", "no")
THREE = np.digitize(X[:, 1] + RNG.standard_normal(N), [-0.5, 0.7]) * 10
WEIGHTS = RNG.uniform(0.3, 2, N)
QUERIES = X[:Q] + 0.3

Logistic = partial(linear_model.LogisticRegression, tol=1e-10, max_iter=10_000)
REGRESSIONS = {
    "linear": linear_model.LinearRegression,
    "ridge": partial(linear_model.Ridge, alpha=3.0),
    "ridge without intercept": partial(linear_model.Ridge, alpha=3.0, fit_intercept=False),
}
CLASSIFIERS = {
    "binary": (Logistic, TWO),
    "strong penalty": (partial(Logistic, C=0.05), TWO),
    "without intercept": (partial(Logistic, fit_intercept=False), TWO),
    "without penalty": (partial(Logistic, C=np.inf), TWO),
    "class weights": (partial(Logistic, class_weight={"no": 2.0}), TWO),
    "liblinear": (partial(Logistic, solver="liblinear", intercept_scaling=3.0), TWO),
    "several classes": (Logistic, THREE),
    "several classes without intercept": (partial(Logistic, fit_intercept=False), THREE),
}


def refits(
    make: Callable[[], Any], y: Any, ask: Callable[[Any], Any], weights: Any = None
) -> np.ndarray:
    """What is asked with each row less without it, `[q, n]`, by fitting n + 1 times."""
    w = np.ones(N) if weights is None else weights
    whole = ask(make().fit(X, y, sample_weight=w))
    columns = []
    for i in range(N):
        kept = np.arange(N) != i
        columns.append(whole - ask(make().fit(X[kept], y[kept], sample_weight=w[kept])))
    return np.stack(columns, 1)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_scores_of_regressions_are_exact_leave_one_out(name: str, weights: Any) -> None:
    make = REGRESSIONS[name]
    estimator = make().fit(X, NUMBERS, sample_weight=weights)
    explained = fb.explain(estimator, X, NUMBERS, weights)
    targets = NUMBERS[:Q]
    expected = {
        "prediction": lambda m: m.predict(QUERIES),
        "loss": lambda m: -0.5 * (m.predict(QUERIES) - targets) ** 2,
    }
    for measure, ask in expected.items():
        scores = explained.scores(QUERIES, targets, measure=measure)
        assert np.allclose(scores.values, refits(make, NUMBERS, ask, weights), atol=1e-10)
    assert scores.provenance.method == "leave_one_out"
    assert scores.provenance.units == "removal"
    own = refits(make, NUMBERS, lambda m: -0.5 * (m.predict(X) - NUMBERS) ** 2, weights)
    assert np.allclose(explained.self_influence(), np.diag(own), atol=1e-10)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_exact_scores_of_classifiers_are_leave_one_out_and_newton_is_near(name: str) -> None:
    make, y = CLASSIFIERS[name]
    estimator = make().fit(X, y)
    at = np.searchsorted(estimator.classes_, y[:Q])

    def log_chance(m: Any) -> np.ndarray:
        return m.predict_log_proba(QUERIES)[np.arange(Q), at]

    real = refits(make, y, log_chance)
    exact = fb.explain(estimator, X, y, method="exact").scores(QUERIES, y[:Q])
    assert np.allclose(exact.values, real, atol=2e-6)
    newton = fb.explain(estimator, X, y).scores(QUERIES, y[:Q])
    assert np.allclose(newton.values, real, atol=0.1 * np.abs(real).max())
    assert exact.provenance.method == "leave_one_out"
    assert newton.provenance.method == "newton_step"
    chance = refits(make, y, lambda m: np.exp(log_chance(m)))
    found = fb.explain(estimator, X, y, method="exact").scores(
        QUERIES, y[:Q], measure="prediction"
    )  # fmt: skip
    assert np.allclose(found.values, chance, atol=2e-6)


def test_sample_weights_of_a_classifier_are_those_of_its_fit() -> None:
    estimator = Logistic().fit(X, TWO, sample_weight=WEIGHTS)
    explained = fb.explain(estimator, X, TWO, WEIGHTS, method="exact")
    at = (TWO[:Q] == "yes").astype(int)
    real = refits(
        Logistic, TWO, lambda m: m.predict_log_proba(QUERIES)[np.arange(Q), at], WEIGHTS
    )  # fmt: skip
    assert np.allclose(explained.scores(QUERIES, TWO[:Q]).values, real, atol=2e-6)
    with pytest.raises(MismatchError, match="standard errors away"):
        fb.explain(estimator, X, TWO)


def test_balanced_class_weights_stay_as_they_are_when_rows_go() -> None:
    estimator = Logistic(class_weight="balanced").fit(X, TWO)
    explained = fb.explain(estimator, X, TWO, method="exact")
    counts = {label: (label == TWO).sum() for label in ("no", "yes")}
    fixed = {label: N / (2 * count) for label, count in counts.items()}
    make = partial(Logistic, class_weight=fixed)
    at = (TWO[:Q] == "yes").astype(int)
    real = refits(make, TWO, lambda m: m.predict_log_proba(QUERIES)[np.arange(Q), at])
    assert np.allclose(explained.scores(QUERIES, TWO[:Q]).values, real, atol=2e-6)


def test_a_group_is_what_a_refit_without_it_says() -> None:
    estimator = Logistic().fit(X, THREE)
    explained = fb.explain(estimator, X, THREE)
    group = [3, 17, 40, 41]
    removed = explained.group(group, "exact")
    kept = np.setdiff1d(np.arange(N), group)
    without = Logistic().fit(X[kept], THREE[kept])
    at = np.searchsorted(estimator.classes_, THREE[:Q])
    change = [m.predict_log_proba(QUERIES)[np.arange(Q), at] for m in (estimator, without)]
    assert np.allclose(removed.effect(QUERIES, THREE[:Q])[0], change[0] - change[1], atol=2e-6)
    centred = without.coef_ - without.coef_.mean(0)
    assert np.allclose(removed.parameters[0, :-1].T, centred, atol=1e-5)


def test_leverages_of_a_regression_are_the_hat_matrix() -> None:
    explained = fb.explain(linear_model.LinearRegression().fit(X, NUMBERS), X, NUMBERS)
    ones = np.concatenate([X, np.ones((N, 1))], 1)
    hat = ones @ np.linalg.solve(ones.T @ ones, ones.T)
    assert np.allclose(explained.leverages(), np.diag(hat))


def test_the_table_of_rows_is_a_data_frame_with_the_index_as_ids() -> None:
    pandas = pytest.importorskip("pandas")
    names = [f"r{i}" for i in range(N)]
    frame = pandas.DataFrame(X, columns=list("abcd"), index=names)
    y = pandas.Series(TWO, index=names)
    explained = fb.explain(Logistic().fit(frame, y), frame, y)
    table = explained.top(QUERIES[0], TWO[0], k=7)
    assert list(table.columns) == ["id", "score", "target"]
    scores = explained.scores(frame.iloc[:1] + 0.3, TWO[:1])
    best = np.argsort(-scores.values[0].numpy(), kind="stable")[:7]
    assert table["id"].tolist() == [names[i] for i in best]
    assert table["target"].tolist() == TWO[best].tolist()
    assert np.allclose(table["score"], scores.values[0].numpy()[best])
    worst = explained.top(frame.iloc[:1] + 0.3, [TWO[0]], k=3, opponents=True)
    assert worst["score"].is_monotonic_increasing
    assert worst["score"].iloc[0] == pytest.approx(scores.values.min().item())
    # A training row is explained by the others.
    own = explained.top("r5", k=N - 1)
    assert "r5" not in own["id"].tolist()
    with pytest.raises(DataError, match="'r500' is not in the training set"):
        explained.top("r500")
    with pytest.raises(DataError, match="takes one query and got 2"):
        explained.top(QUERIES[:2], TWO[:2])


def test_without_pandas_the_table_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    explained = fb.explain(linear_model.LinearRegression().fit(X, NUMBERS), X, NUMBERS)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match=r"forebear\[sklearn\]"):
        explained.top(3)


def test_a_solver_that_stopped_early_is_polished() -> None:
    sloppy = linear_model.LogisticRegression(tol=1e-2).fit(X, TWO)
    exact = Logistic().fit(X, TWO)
    assert np.abs(sloppy.coef_ - exact.coef_).max() > 1e-4
    one, other = (fb.explain(fitted, X, TWO).scores(QUERIES, TWO[:Q]) for fitted in (sloppy, exact))
    assert torch.allclose(one.values, other.values, atol=1e-9)


def test_stopping_further_off_than_any_row_moves_it_is_said() -> None:
    x, y = two_classes(4000, 4, 0)
    sloppy = Logistic().fit(x, y)
    sloppy.coef_ = sloppy.coef_ + np.array([0.0, 0.009, 0, 0])
    with pytest.warns(NumericalWarning, match="more than any single example moves it"):
        fb.explain(sloppy, x, y)


def other(**changes: Any) -> Any:
    return SimpleNamespace(**changes)


@pytest.mark.parametrize(
    ("estimator", "error", "words"),
    [
        (linear_model.Ridge(), TaskError, "not fitted"),
        (linear_model.Lasso().fit(X, NUMBERS), TaskError, "LinearRegression, Ridge, Logistic"),
        (linear_model.RidgeClassifier().fit(X, TWO), TaskError, "cannot be explained"),
        (linear_model.SGDClassifier().fit(X, TWO), TaskError, "cannot be explained"),
        (linear_model.LinearRegression(positive=True).fit(X, NUMBERS), TaskError, "positive=True"),
        (linear_model.Ridge().fit(X[:, :2], NUMBERS), MismatchError, "fitted to 2"),
        (linear_model.Ridge().fit(X, NUMBERS + X[:, 2]), MismatchError, "standard errors away"),
        (linear_model.Ridge().fit(X[1:], NUMBERS[1:]), MismatchError, "standard errors away"),
    ],
)
def test_what_cannot_be_explained_is_refused(estimator: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        fb.explain(estimator, X, NUMBERS)


def test_penalties_with_kinks_are_refused() -> None:
    kinked = Logistic(solver="saga", l1_ratio=0.5).fit(X, TWO)
    with pytest.raises(TaskError, match="kinks"):
        fb.explain(kinked, X, TWO)


def test_bad_questions_are_refused() -> None:
    explained = fb.explain(Logistic().fit(X, TWO), X, TWO)
    with pytest.raises(DataError, match="needs the targets"):
        explained.scores(QUERIES)
    with pytest.raises(DataError, match="'maybe' is none"):
        explained.scores(QUERIES, ["maybe"] * Q)
    with pytest.raises(DataError, match="sparse"):
        fb.explain(Logistic().fit(X, TWO), SimpleNamespace(toarray=None), TWO)
    with pytest.raises(UnknownNameError, match="did you mean 'exact'"):
        fb.explain(Logistic().fit(X, TWO), X, TWO, method="exakt")
    with pytest.raises(UnknownNameError, match="unknown option of explain"):
        fb.explain(Logistic().fit(X, TWO), X, TWO, damping=0.1)
    regression = fb.explain(linear_model.LinearRegression().fit(X, NUMBERS), X, NUMBERS)
    with pytest.raises(DataError, match="needs a classifier"):
        regression.scores(QUERIES, NUMBERS[:Q], measure="margin")
    queries = QUERIES.copy()
    queries[0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        explained.scores(queries, TWO[:Q])


def test_margins_and_predictions_need_no_labels() -> None:
    estimator = Logistic().fit(X, TWO)
    explained = fb.explain(estimator, X, TWO)
    predicted = estimator.predict(QUERIES)
    for measure in ("margin", "prediction"):
        one = explained.scores(QUERIES, measure=measure).values
        assert torch.equal(one, explained.scores(QUERIES, predicted, measure=measure).values)


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=1e-3)
    x, y = torch.as_tensor(X).float(), torch.as_tensor(THREE // 10)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_torch_model_is_explained_by_a_method_of_the_library(wrapped: bool) -> None:
    model, y = trained(), THREE // 10
    task = fb.Task(model, fb.losses.cross_entropy)
    estimator = other(module_=model, criterion_=nn.CrossEntropyLoss()) if wrapped else task
    explained = fb.explain(estimator, X, y, method="ekfac", damping=0.2)
    scores = explained.scores(QUERIES, y[:Q])
    data = (torch.as_tensor(X).float(), torch.as_tensor(y))
    direct = fb.EKFAC(damping=0.2).fit(task, data)
    queries = (torch.as_tensor(QUERIES).float(), torch.as_tensor(y[:Q]))
    assert torch.equal(scores.values, direct.score(queries).values)
    assert torch.equal(explained.self_influence(), direct.self_influence())
    pytest.importorskip("pandas")
    assert explained.top(QUERIES[0], y[0], k=3)["id"].tolist() == scores.top(3).ids[0].tolist()
    assert 7 not in explained.top(7, k=N - 1)["id"].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        removed = explained.group([1, 2, 3])
    assert removed.effect(queries).shape == (1, Q)
    assert explained.leverages().shape == (N,)
    with pytest.raises(DataError, match="need their targets"):
        explained.scores(QUERIES)


def test_an_unknown_criterion_asks_for_a_task() -> None:
    with pytest.raises(TaskError, match="HuberLoss has no ready loss"):
        fb.explain(other(module_=trained(), criterion_=nn.HuberLoss()), X, THREE)
    with pytest.raises(TaskError, match="SimpleNamespace cannot be explained"):
        fb.explain(other(), X, THREE)
