"""`RemovalEstimate`: what removing groups does, for linear models and for networks."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from linear_oracles import least_squares, logistic, two_classes
from torch import Tensor, nn

import forebear as fb
from forebear.errors import DataError, NumericalWarning, TaskError, UnknownNameError
from forebear.removal import LinearModel

N = 150
X, Y = two_classes(N, 3, 0)
PENALTY = np.array([0.5, 0.5, 0.5, 0.0])


def logistic_model() -> LinearModel:
    return LinearModel.of(X, Y, penalty=0.5, intercept=True).fitted()


def refit(group: list[int]) -> np.ndarray:
    kept = np.setdiff1d(np.arange(N), group)
    ones = np.concatenate([X, np.ones((N, 1))], 1)
    return logistic(ones[kept], Y[kept], PENALTY)


def test_parameters_and_measurements_without_groups_are_those_of_refits() -> None:
    estimate = fb.RemovalEstimate(logistic_model())
    groups = [[3], [5, 9, 2], [7, 8, 9]]
    removed = estimate.remove(groups, "exact", bound=True)
    queries, labels = two_classes(6, 3, 1)
    ones = np.concatenate([queries, np.ones((6, 1))], 1)
    whole = refit([])
    for i, group in enumerate(groups):
        without = refit(group)
        assert np.allclose(removed.parameters[i, :, 0], without, atol=1e-10)
        z, moved = ones @ whole, ones @ without
        expected = {
            "loss": (np.logaddexp(0, moved) - labels * moved)
            - (np.logaddexp(0, z) - labels * z),
            "margin": (2 * labels - 1) * (z - moved),
            "prediction": 1 / (1 + np.exp(-(2 * labels - 1) * z))
            - 1 / (1 + np.exp(-(2 * labels - 1) * moved)),
        }  # fmt: skip
        for measure, values in expected.items():
            found = removed.effect(queries, labels, measure=measure)[i]
            assert np.allclose(found, values, atol=1e-10), measure
            small = removed.effect(queries, labels, measure=measure, linear=True)[i]
            assert np.allclose(small, values, atol=0.1 * np.abs(values).max()), measure
    assert (removed.error == 0).all()
    assert removed.bound is not None
    assert (removed.bound.distance < 1e-10).all()
    assert removed.output_bound(queries).shape == (3, 6, 1)


def test_estimated_errors_are_near_the_real_ones_and_below_the_bound() -> None:
    estimate = fb.RemovalEstimate(logistic_model())
    groups = [list(range(i, i + 4)) for i in range(0, 40, 4)]
    exact = estimate.remove(groups, "exact").shift
    for name in ("influence", "rescaled", "rescaled_n", "rescaled_d", "newton_step"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericalWarning)
            removed = estimate.remove(groups, name, bound=True)
        real = (removed.shift - exact).norm(dim=1)
        assert torch.allclose(removed.error, real, rtol=0.35), name
        assert removed.bound is not None
        assert (real <= removed.bound.distance).all()
    second = estimate.remove(groups, "newton_step_2")
    real = (second.shift - exact).norm(dim=1)
    assert (second.error > 0.1 * real).all()


def test_leaving_the_regime_is_said() -> None:
    estimate = fb.RemovalEstimate(logistic_model())
    large = list(range(70))
    with pytest.warns(NumericalWarning, match=r"influence is off by about .* 70 of 150"):
        estimate.remove(large, "influence")
    with pytest.warns(NumericalWarning, match="use newton_step_2 or exact"):
        estimate.remove(large, "newton_step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate.remove(large, "influence", check=False)
        estimate.remove([1, 2], "newton_step")


def test_a_model_off_its_optimum_is_said() -> None:
    model = logistic_model()
    moved = replace(model, parameters=model.parameters + 1e-3)
    with pytest.warns(NumericalWarning, match="not at its optimum"):
        fb.RemovalEstimate(moved).remove([3, 4], "newton_step")


def test_removing_a_whole_class_is_said() -> None:
    labels = np.zeros(40, dtype=int)
    labels[:3] = 1
    model = LinearModel.of(two_classes(40, 2, 0)[0], labels, penalty=1.0).fitted()
    with pytest.warns(NumericalWarning) as caught:
        fb.RemovalEstimate(model).remove([0, 1, 2], "exact")
    assert any("every example of a class" in str(warning.message) for warning in caught)


def test_ids_are_names_of_rows() -> None:
    names = np.array([f"row-{i}" for i in range(N)])
    model = LinearModel.of(X, Y, penalty=0.5, intercept=True, ids=names).fitted()
    one = fb.RemovalEstimate(model).remove(["row-9", "row-2"])
    other = fb.RemovalEstimate(logistic_model()).remove([2, 9])
    assert torch.allclose(one.shift, other.shift)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([], "is empty"),
        ([[]], "is empty"),
        ([[1], []], "is empty"),
        ([1, 150], "id 150 is not in the training set of 150"),
        ([4, 4], "id 4 stands twice"),
        (list(range(N)), "all 150 examples"),
        ([1, [2, 3]], "mix ids and lists"),
        (["a"], "not of the kind"),
    ],
)
def test_impossible_groups_are_refused(groups: list, words: str) -> None:
    with pytest.raises(DataError, match=words):
        fb.RemovalEstimate(logistic_model()).remove(groups)


def test_other_bad_input_is_refused_by_name() -> None:
    estimate = fb.RemovalEstimate(logistic_model())
    with pytest.raises(UnknownNameError, match="did you mean 'influence'"):
        estimate.remove([1], "influense")
    removed = estimate.remove([1])
    with pytest.raises(DataError, match="needs the targets"):
        removed.effect(X[:2])
    with pytest.raises(DataError, match="queries have 2 columns"):
        removed.effect(X[:2, :2], Y[:2])
    with pytest.raises(DataError, match="3 targets were given for 2"):
        removed.effect(X[:2], Y[:3])
    with pytest.raises(UnknownNameError, match="unknown measure"):
        removed.effect(X[:2], Y[:2], measure="los")
    with pytest.raises(TaskError, match="needs remove"):
        removed.output_bound(X[:2])
    with pytest.raises(DataError, match="training set"):
        fb.RemovalEstimate(fb.Task(nn.Linear(2, 2), fb.losses.cross_entropy))
    with pytest.raises(TaskError, match="wrap it in a Task"):
        fb.RemovalEstimate(nn.Linear(2, 2), X, Y)


def test_a_linear_task_gives_what_the_linear_model_gives() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 4)), rng.standard_normal(60)
    decay = 0.02
    theta = least_squares(x, y, np.full(4, 60 * decay))
    module = nn.Linear(4, 1, bias=False).double()
    module.weight.data[:] = torch.as_tensor(theta)
    task = fb.Task(module, fb.losses.squared_error)
    data = (torch.as_tensor(x), torch.as_tensor(y)[:, None])
    network = fb.RemovalEstimate(task, data, damping=fb.Absolute(decay), batch_size=7)
    linear = fb.RemovalEstimate(LinearModel.of(x, y, penalty=60 * decay).fitted())
    assert torch.allclose(network.leverages(), linear.leverages(), rtol=1e-10)
    groups = [[3, 8, 20], [1], list(range(30))]
    queries = (data[0][:5], data[1][:5])
    for name in ("influence", "rescaled", "rescaled_n", "rescaled_d", "newton_step"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericalWarning)
            one, other = network.remove(groups, name), linear.remove(groups, name)
        assert torch.allclose(one.shift, other.shift, atol=1e-11), name
        for along in (False, True):
            found = one.effect(queries, linear=along)
            assert torch.allclose(found, other.effect(x[:5], y[:5], linear=along), atol=1e-11)
    assert torch.allclose(one.parameters[1], other.parameters[1, :, 0], atol=1e-11)
    kept = np.delete(np.arange(60), 1)
    refitted = least_squares(x[kept], y[kept], np.full(4, 60 * decay))
    assert np.allclose(one.parameters[1], refitted, atol=1e-11)


def trained_network() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.as_tensor(X), torch.as_tensor(Y)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        loss = fb.losses.cross_entropy(model, (x, y)).mean() + 0.01 * decay
        loss.backward()
        return loss

    optimizer.step(closure)
    return model, (x, y)


def test_for_a_network_the_newton_step_foresees_retraining() -> None:
    model, data = trained_network()
    task = fb.Task(model, fb.losses.cross_entropy)
    estimate = fb.RemovalEstimate(task, data, damping=fb.Absolute(0.02))
    group = list(range(0, 30, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    removed = estimate.remove(group, "newton_step")
    effect = removed.effect(data)[0]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.isnan(removed.error).all()  # nothing better to compare with
    kept = np.setdiff1d(np.arange(N), group)
    again = fb.Task(model, fb.losses.cross_entropy).copy_model()
    optimizer = torch.optim.LBFGS(again.parameters(), max_iter=500, tolerance_grad=1e-10)
    x, y = data[0][kept], data[1][kept]

    def closure() -> Tensor:
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in again.parameters())
        loss = fb.losses.cross_entropy(again, (x, y)).sum() / N + 0.01 * decay
        loss.backward()
        return loss

    optimizer.step(closure)
    real = fb.losses.cross_entropy(again, data) - fb.losses.cross_entropy(model, data)
    assert np.corrcoef(effect, real.detach())[0, 1] > 0.95


def test_what_a_network_cannot_give_is_refused() -> None:
    model, data = trained_network()
    estimate = fb.RemovalEstimate(fb.Task(model, fb.losses.cross_entropy), data)
    for name in ("exact", "newton_step_2"):
        with pytest.raises(TaskError, match="needs a linear model"):
            estimate.remove([1, 2], name)
    with pytest.raises(TaskError, match="nothing is proved for a network"):
        estimate.remove([1, 2], bound=True, check=False)
    large = fb.Task(nn.Linear(300, 100), fb.losses.cross_entropy)
    wide = (torch.randn(4, 300), torch.zeros(4, dtype=torch.long))
    with pytest.raises(TaskError, match="30100 parameters does not fit"):
        fb.RemovalEstimate(large, wide)
    plain = fb.Task(model, lambda model, batch: fb.losses.cross_entropy(model, batch))
    with pytest.raises(TaskError, match="plain loss"):
        fb.RemovalEstimate(plain, data).remove([1])
