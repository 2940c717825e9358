"""The estimators' identities, their orders, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_oracles import cosines, least_squares, logistic, softmax, two_classes

from forebear.errors import DataError, NumericalWarning, TaskError, UnknownNameError
from forebear.removal import ESTIMATORS, Factorised, LinearModel, shift

FAMILIES = ("squared", "logistic", "softmax")


def model(family: str, n: int = 60, d: int = 4, penalty: float = 0.5, seed: int = 0) -> LinearModel:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    y = {
        "squared": x[:, 0] + rng.standard_normal(n),
        "logistic": (x[:, 0] + rng.standard_normal(n) > 0).astype(int),
        "softmax": (x[:, 0] + rng.standard_normal(n) > 0).astype(int) + rng.integers(0, 2, n),
    }[family]
    weights = rng.uniform(0.5, 2, n)
    made = LinearModel.of(
        x, y, family=family, penalty=penalty, intercept=True, weights=weights
    )  # fmt: skip
    return made.fitted()


def sets(n: int, k: int, m: int = 5, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.as_tensor(np.stack([rng.choice(n, k, replace=False) for _ in range(m)]))


def refit(of: LinearModel, group: torch.Tensor) -> np.ndarray:
    """The optimum without a group, by an oracle that shares no code."""
    kept = np.setdiff1d(np.arange(len(of)), group.numpy())
    x, y, w = of.features.numpy()[kept], of.targets.numpy()[kept], of.weights.numpy()[kept]
    oracle = least_squares if of.family.name == "squared" else logistic
    return oracle(x, y[:, 0], of.penalty.numpy(), w)


@pytest.mark.parametrize("family", ["squared", "logistic"])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_exact_is_a_refit_by_other_means(family: str, k: int) -> None:
    fitted = model(family)
    groups = sets(60, k)
    found = shift(Factorised(fitted), groups, "exact")
    for group, moved in zip(groups, found, strict=True):
        without = refit(fitted, group)
        assert np.allclose(fitted.parameters[:, 0] + moved, without, atol=1e-11)


def test_exact_is_a_refit_for_several_classes() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((50, 3)), rng.integers(0, 3, 50)
    fitted = LinearModel.of(x, y, penalty=2.0).fitted()
    groups = sets(50, 4, m=3)
    found = shift(Factorised(fitted), groups, "exact").view(3, 3, 3)
    for group, moved in zip(groups, found, strict=True):
        kept = np.setdiff1d(np.arange(50), group.numpy())
        without = softmax(x[kept], y[kept], 3, np.full(3, 2.0))
        assert np.allclose(fitted.parameters + moved, without, atol=1e-6)


@pytest.mark.parametrize("penalty", [0.0, 3.0])
def test_one_removed_from_least_squares_is_exact_by_newton_and_by_rescaling(
    penalty: float,
) -> None:
    factorised = Factorised(model("squared", penalty=penalty))
    every = torch.arange(60)[:, None]
    exact = shift(factorised, every, "exact")
    for name in ("rescaled", "rescaled_d", "newton_step", "newton_step_2"):
        assert torch.allclose(shift(factorised, every, name), exact, atol=1e-12), name
    h = factorised.leverages
    plain = shift(factorised, every, "influence")
    assert torch.allclose(plain / (1 - h)[:, None], exact, atol=1e-12)


@settings(deadline=None, max_examples=12)
@given(
    family=st.sampled_from(FAMILIES),
    penalty=st.sampled_from([0.1, 1.0, 30.0]),
    d=st.integers(1, 6),
    seed=st.integers(0, 20),
)
def test_identities(family: str, penalty: float, d: int, seed: int) -> None:
    fitted = model(family, d=d, penalty=penalty, seed=seed)
    factorised = Factorised(fitted)
    every = torch.arange(60)[:, None]
    newton = shift(factorised, every, "newton_step")
    # Newton and rescaled are one for a single example; nothing is corrected at k = 1.
    assert torch.allclose(shift(factorised, every, "rescaled"), newton, atol=1e-11)
    assert torch.allclose(shift(factorised, every, "rescaled_d"), newton, atol=1e-11)
    # Leverages add up to the trace of H⁻¹ Σ H_i.
    of_data = fitted.hessian() - fitted.penalty_matrix()
    trace = torch.linalg.solve(fitted.hessian(), of_data).trace()
    assert factorised.leverages.sum().item() == pytest.approx(trace.item(), rel=1e-9)
    # At the optimum Σ g_i = −Λθ.
    pulled = fitted.pull(torch.arange(60)[None], fitted.residuals[None])[0]
    decay = -(fitted.penalty[:, None] * fitted.parameters).flatten()
    assert torch.allclose(pulled, decay, atol=1e-9)
    # Influence and rescaled influence are sums over the members.
    group = sets(60, 7, m=1, seed=seed)
    for name in ("influence", "rescaled"):
        parts = shift(factorised, group[0][:, None], name).sum(0)
        assert torch.allclose(shift(factorised, group, name)[0], parts, atol=1e-11)
    # The small system of Woodbury and the large one give the same step.
    wide = sets(60, 30, m=2, seed=seed)
    for groups in (group, wide):
        step = shift(factorised, groups, "newton_step")[0]
        left = fitted.hessian_at((fitted.curvatures * _kept(60, groups[0]))[None])[0]
        gradient = fitted.pull(groups[:1], fitted.residuals[groups[:1]])[0]
        assert torch.allclose(left @ step, gradient, atol=1e-9)


def _kept(n: int, group: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(n, 1, 1, dtype=torch.float64)
    mask[group] = 0
    return mask


def test_a_row_of_weight_zero_moves_nothing() -> None:
    x, y = two_classes(40, 3, 0)
    weights = np.ones(40)
    weights[7] = 0
    factorised = Factorised(LinearModel.of(x, y, penalty=1.0, weights=weights).fitted())
    for name in ESTIMATORS:
        assert shift(factorised, torch.tensor([[7]]), name).abs().max() < 1e-12, name


def test_a_large_penalty_makes_rescaled_influence_influence() -> None:
    factorised = Factorised(model("logistic", penalty=1e6))
    every = torch.arange(60)[:, None]
    ratio = shift(factorised, every, "rescaled") / shift(factorised, every, "influence")
    # The intercept has no penalty, and keeps a leverage of about 1/n.
    assert (ratio - 1).abs().max() < 0.1
    full = LinearModel.of(*two_classes(60, 3, 0), penalty=1e6).fitted()
    whole = Factorised(full)
    change = shift(whole, every, "rescaled") - shift(whole, every, "influence")
    assert change.abs().max() < 1e-4 * shift(whole, every, "influence").abs().max()


def test_the_orders_in_n_are_one_two_two_and_three() -> None:
    errors = {name: [] for name in ("influence", "newton_step", "newton_step_2")}
    sizes, shifts = (1000, 4000), []
    for n in sizes:
        each = {name: [] for name in errors}
        norms = []
        for seed in range(3):
            x, y = two_classes(n, 20, seed)
            factorised = Factorised(LinearModel.of(x, y).fitted())
            groups = sets(n, 20, m=30, seed=seed)
            exact = shift(factorised, groups, "exact")
            norms.append(exact.norm(dim=1).mean().item())
            for name in errors:
                distance = (shift(factorised, groups, name) - exact).norm(dim=1).mean()
                each[name].append(distance.item())
        shifts.append(np.mean(norms))
        for name in errors:
            errors[name].append(np.mean(each[name]))
    span = np.log(sizes[1] / sizes[0])
    assert np.log(shifts[1] / shifts[0]) / span == pytest.approx(-1, abs=0.15)
    for name, order in (("influence", -2), ("newton_step", -2), ("newton_step_2", -3)):
        assert np.log(errors[name][1] / errors[name][0]) / span == pytest.approx(order, abs=0.3)


def test_size_corrections_repair_rescaled_influence_for_large_groups() -> None:
    found = {name: [] for name in ("newton_step", "rescaled", "rescaled_n", "rescaled_d")}
    for seed in range(3):
        x, y = two_classes(4000, 10, seed)
        factorised = Factorised(LinearModel.of(x, y, penalty=300.0).fitted())
        groups = sets(4000, 400, m=8, seed=seed)
        exact = shift(factorised, groups, "exact")
        for name in found:
            found[name].append((shift(factorised, groups, name) - exact).norm(dim=1).mean().item())
    mean = {name: np.mean(values) for name, values in found.items()}
    assert mean["rescaled_d"] < 2 * mean["newton_step"]
    assert mean["rescaled"] > 2 * mean["rescaled_d"]
    assert mean["rescaled_n"] > 2 * mean["rescaled_d"]  # rescaling alone takes the penalty along


def test_least_squares_on_diabetes_as_published() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    train, test = np.arange(len(x)) % 10 != 0, np.arange(len(x)) % 10 == 0
    ones = np.ones((len(x), 1))
    x = np.concatenate([x, ones], 1)
    fitted = LinearModel.of(x[train], y[train]).fitted()
    factorised = Factorised(fitted)
    every = torch.arange(int(train.sum()))[:, None]
    real = np.stack(
        [
            least_squares(np.delete(x[train], i, 0), np.delete(y[train], i), np.zeros(11))
            for i in range(len(every))
        ]
    )
    theta = fitted.parameters[:, 0].numpy()
    change = (real - theta) @ x[test].T  # [n, q]
    plain = shift(factorised, every, "influence").numpy() @ x[test].T
    h = factorised.leverages.numpy()[:, None]
    assert np.abs(plain / (1 - h) - change).max() < 1e-12
    assert cosines(plain.T, change.T).mean() >= 0.999
    left = x[test] @ theta - y[test]
    loss = 0.5 * (left + change) ** 2 - 0.5 * left**2
    agreement = cosines((plain * left).T, loss.T)
    assert agreement.mean() >= 0.99
    assert agreement.min() >= 0.9


@pytest.mark.parametrize(("decay", "mean", "least"), [(0.1, 0.99, 0.98), (0.01, 0.99, 0.94)])
def test_influence_on_breast_cancer_as_published(decay: float, mean: float, least: float) -> None:
    change, plain = _breast_cancer(decay, 1.0)
    agreement = cosines(plain, change)
    assert agreement.mean() >= mean
    assert agreement.min() >= least


@pytest.mark.parametrize("decay", [0.1, 1e-3])
def test_fractional_removal_is_influence_at_any_penalty(decay: float) -> None:
    change, plain = _breast_cancer(decay, 0.01)
    assert cosines(plain, change).mean() >= 0.999
    ratio = np.linalg.norm(plain, axis=1) / np.linalg.norm(change, axis=1)
    assert ratio.mean() == pytest.approx(1, abs=0.005)


def _breast_cancer(decay: float, removed: float) -> tuple[np.ndarray, np.ndarray]:
    """Real and predicted rise of test losses `[q, n]` when a share of one row's weight goes."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    train, test = np.arange(len(x)) % 10 != 0, np.arange(len(x)) % 10 == 0
    n = int(train.sum())
    penalty = np.full(x.shape[1], decay * n)
    fitted = LinearModel.of(x[train], y[train], penalty=penalty).fitted()
    rows = np.arange(0, n, 12)
    theta = fitted.parameters[:, 0].numpy()
    real = []
    for i in rows:
        weights = np.ones(n)
        weights[i] -= removed
        real.append(logistic(x[train], y[train], penalty, weights))

    def loss(parameters: np.ndarray) -> np.ndarray:
        z = x[test] @ parameters
        return np.logaddexp(0, z) - y[test] * z

    change = np.stack([loss(parameters) - loss(theta) for parameters in real], 1)
    step = removed * shift(Factorised(fitted), torch.as_tensor(rows)[:, None], "influence").numpy()
    slope = 1 / (1 + np.exp(-x[test] @ theta)) - y[test]
    return change, slope[:, None] * (x[test] @ step.T)


def test_a_leverage_of_one_is_cut_off_with_a_warning_and_refused_by_newton() -> None:
    x = np.random.default_rng(0).standard_normal((30, 3))
    x = np.concatenate([x, np.zeros((30, 1))], 1)
    x[4, 3] = 1.0  # alone in its column
    factorised = Factorised(LinearModel.of(x, x[:, 0] + 0.1 * x[:, 1] ** 2).fitted())
    assert factorised.leverages[4].item() == pytest.approx(1, abs=1e-9)
    with pytest.warns(NumericalWarning, match="leverage within 1e-08 of one"):
        assert torch.isfinite(shift(factorised, torch.tensor([[4]]), "rescaled")).all()
    with pytest.raises(TaskError, match=r"without set 0 is singular.*smallest eigenvalue"):
        shift(factorised, torch.tensor([[4]]), "newton_step")


def test_separated_labels_without_a_penalty_have_no_optimum() -> None:
    x = np.linspace(-1, 1, 20)[:, None]
    labels = (x[:, 0] > 0).astype(int)
    with pytest.raises(TaskError, match=r"separated|singular"):
        LinearModel.of(x, labels, intercept=True).fitted()
    # Removing the one row that keeps them from being separated.
    labels[3] = 1
    factorised = Factorised(LinearModel.of(x, labels).fitted())
    with pytest.raises(TaskError, match=r"separated|singular|did not settle"):
        shift(factorised, torch.tensor([[3]]), "exact")


def test_columns_that_others_determine_are_refused() -> None:
    x, y = two_classes(30, 2, 0)
    twice = np.concatenate([x, x[:, :1]], 1)
    with pytest.raises(TaskError, match="singular"):
        LinearModel.of(twice, y).fitted()
    found = LinearModel.of(twice, y, penalty=0.1).fitted()
    assert found.parameters[0, 0].item() == pytest.approx(found.parameters[2, 0].item())


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "is empty"),
        (torch.arange(60)[None], "60 of 60"),
        (torch.tensor([[1, 60]]), "position 60 is out of range"),
        (torch.tensor([[-1, 3]]), "position -1 is out of range"),
        (torch.tensor([[3, 5, 3]]), "position 3 stands twice"),
        (torch.tensor([[0.5]]), "give positions"),
    ],
)
def test_impossible_sets_are_refused(groups: torch.Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        shift(Factorised(model("logistic")), groups, "newton_step")


def test_an_unknown_estimator_comes_with_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'newton_step'"):
        shift(Factorised(model("logistic")), sets(60, 2), "newton")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"penalty": -1.0}, "penalty -1 is negative"),
        ({"weights": -np.ones(60)}, "must be 60 numbers"),
        ({"ids": np.zeros(60)}, "one different id each"),
        ({"family": "poisson"}, "family is 'poisson'"),
    ],
)
def test_bad_models_are_refused(change: dict, words: str) -> None:
    x, y = two_classes(60, 3, 0)
    with pytest.raises(DataError, match=words):
        LinearModel.of(x, y, **change)


def test_values_that_are_not_finite_are_named() -> None:
    x, y = two_classes(60, 3, 0)
    x[11, 1] = np.nan
    with pytest.raises(DataError, match="features of row 11"):
        LinearModel.of(x, y)
