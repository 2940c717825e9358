"""Further training against influence, its exact derivative, and what the paper says of both.

The oracles are dense: Hessians and Gauss-Newton matrices from `torch.func`, solved by numpy.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.functional import cross_entropy

import forebear as fb
from forebear.methods.unrolled import Path as Trajectory
from forebear.methods.unrolled import Unrolled
from forebear.metrics import cosine_similarity
from forebear.training import FurtherTraining

datasets = pytest.importorskip("sklearn.datasets")
selection = pytest.importorskip("sklearn.model_selection")


@cache
def dataset(name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test set, standardised on the training set."""
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    parts = selection.train_test_split(x, y, test_size=0.1, random_state=0)
    x, x_test = ((p - parts[0].mean(0)) / (parts[0].std(0) + 1e-8) for p in parts[:2])
    regression = name == "diabetes"
    y, y_test = (
        ((p - parts[2].mean()) / parts[2].std())[:, None] if regression else p for p in parts[2:]
    )
    return tuple(map(torch.as_tensor, (x, y))), tuple(map(torch.as_tensor, (x_test, y_test)))


def network(name: str, width: int) -> nn.Module:
    (x, y), _ = dataset(name)
    outputs = 1 if y.is_floating_point() else int(y.max()) + 1
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(x.shape[1], width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, outputs),
    ).double()


@cache
def trained(name: str, width: int, epochs: int) -> nn.Module:
    train, _ = dataset(name)
    model = network(name, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(train[0]), generator=generator).split(64):
            optimizer.zero_grad()
            loss(model, (train[0][rows], train[1][rows])).mean().backward()
            optimizer.step()
    return model.eval()


def loss(model: nn.Module, batch: Any) -> Tensor:
    if batch[1].is_floating_point():
        return 0.5 * (model(batch[0]) - batch[1]).square().sum(1)
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def some_rows(n: int, count: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(1))[:count].tolist()


def first(data: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    return data[0][:count], data[1][:count]


def flat_gradients(model: nn.Module, data: tuple[Tensor, Tensor]) -> np.ndarray:
    """Per-example loss gradients `[n, P]`."""
    state = {name: p.detach() for name, p in model.named_parameters()}

    def single(state: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(lambda inputs: functional_call(model, state, (inputs,)), (x[None], y[None]))[0]

    found = vmap(grad(single), in_dims=(None, 0, 0))(state, *data)
    return torch.cat([found[name].flatten(1) for name in state], 1).numpy()


def gauss_newton(model: nn.Module, data: tuple[Tensor, Tensor]) -> np.ndarray:
    """`[P, P]` for softmax cross-entropy or half the squared error."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    outputs = functional_call(model, state, (data[0],))

    def single(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, state, (x[None],))[0]

    found = vmap(jacrev(single), in_dims=(None, 0))(state, data[0])
    jacobians = torch.cat([found[name].flatten(2) for name in state], 2)  # [n, c, P]
    if not data[1].is_floating_point():
        p = outputs.softmax(1)
        mean = torch.einsum("nc,ncp->np", p, jacobians)
        jacobians = p.sqrt()[..., None] * (jacobians - mean[:, None])
    rows = jacobians.flatten(0, 1)
    return (rows.T @ rows / len(data[0])).detach().numpy()


def mean_cosine(scores: Any, gold: Any) -> float:
    return float(np.nanmean(cosine_similarity(scores, gold)))


def ratio(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a)) / np.linalg.norm(np.asarray(b)))


class TestAtALogisticOptimum:
    """Breast cancer, two logits' difference as one weight vector, ridge kept as weight decay."""

    @staticmethod
    def problem(ridge: float) -> tuple[fb.Task, np.ndarray, np.ndarray]:
        """The task at the optimum, gradients and the Hessian with the ridge."""
        train, _ = dataset("breast_cancer")
        model = nn.Linear(train[0].shape[1], 1).double()

        def logistic(model: nn.Module, batch: Any) -> Tensor:
            signs = 2.0 * batch[1] - 1
            return nn.functional.softplus(-signs * model(batch[0])[:, 0])

        x = np.hstack([train[0].numpy(), np.ones((len(train[0]), 1))])
        signs = 2.0 * train[1].numpy() - 1
        theta = np.zeros(x.shape[1])
        for _ in range(30):
            p = 1 / (1 + np.exp(signs * (x @ theta)))
            curvature = (x.T * (p * (1 - p))) @ x / len(x) + ridge * np.eye(len(theta))
            theta = theta - np.linalg.solve(curvature, -x.T @ (signs * p) / len(x) + ridge * theta)
        gradients = -(signs * p)[:, None] * x
        with torch.no_grad():
            model.weight.copy_(torch.as_tensor(theta[None, :-1]))
            model.bias.copy_(torch.as_tensor(theta[-1:]))
        return fb.Task(model.eval(), logistic), gradients, curvature

    def test_a_hundredth_of_an_example_removed_is_influence(self) -> None:
        ridge, n = 1e-3, len(dataset("breast_cancer")[0][0])
        task, gradients, curvature = self.problem(ridge)
        train, queries = dataset("breast_cancer")
        top = np.linalg.eigvalsh(curvature)[-1]
        beta = ((1 - (ridge / top) ** 0.5) / (1 + (ridge / top) ** 0.5)) ** 2
        further = FurtherTraining(
            learning_rate=(1 + beta**0.5) ** 2 / top,
            momentum=beta,
            weight_decay=ridge,
            batch_size=n,
            amounts=(1200,),
            fraction=0.01,
            seeds=1,
            max_seeds=None,
        )
        rows = some_rows(n, 40)
        gold = further.measure(task, train, queries, left_out=rows).gold()[0]
        x = np.hstack([queries[0].numpy(), np.ones((len(queries[0]), 1))])
        theta = np.append(task.model.weight.detach()[0], task.model.bias.detach())
        signs = 2.0 * queries[1].numpy() - 1
        query_gradients = -(signs / (1 + np.exp(signs * (x @ theta))))[:, None] * x
        influence = query_gradients @ np.linalg.solve(curvature, gradients[rows].T) / n
        assert mean_cosine(influence, gold) >= 0.999
        assert ratio(influence, gold) == pytest.approx(1, abs=0.005)

    def test_it_grows_from_graddot_into_influence_and_the_filter_holds_throughout(self) -> None:
        ridge, n = 0.1, len(dataset("breast_cancer")[0][0])
        task, gradients, curvature = self.problem(ridge)
        train, queries = dataset("breast_cancer")
        values, vectors = np.linalg.eigh(curvature)
        rate = 1 / values[-1]
        amounts = (1, 3, 10, 30, 100, 300)
        further = FurtherTraining(
            learning_rate=rate,
            weight_decay=ridge,
            batch_size=n,
            amounts=amounts,
            seeds=1,
            max_seeds=None,
        )
        rows = some_rows(n, 50)
        gold = further.measure(task, train, queries, left_out=rows).gold()
        queried = self.gradients_of(task, queries) @ vectors  # [q, P]
        trained_on = gradients[rows] @ vectors / n
        graddot = queried @ trained_on.T
        influence = (queried / values) @ trained_on.T
        first_order = [mean_cosine(graddot, g) for g in gold]
        second_order = [mean_cosine(influence, g) for g in gold]
        filtered = [
            mean_cosine((queried * ((1 - (1 - rate * values) ** t) / values)) @ trained_on.T, g)
            for t, g in zip(amounts, gold, strict=True)
        ]
        assert first_order[0] >= 0.999
        assert second_order[0] == pytest.approx(0.88, abs=0.05)
        assert min(second_order[-2:]) >= 0.995
        assert first_order[-1] == pytest.approx(0.88, abs=0.05)
        assert min(filtered) >= 0.995

    @staticmethod
    def gradients_of(task: fb.Task, data: tuple[Tensor, Tensor]) -> np.ndarray:
        x = np.hstack([data[0].numpy(), np.ones((len(data[0]), 1))])
        theta = np.append(task.model.weight.detach()[0], task.model.bias.detach())
        signs = 2.0 * data[1].numpy() - 1
        return -(signs / (1 + np.exp(signs * (x @ theta))))[:, None] * x


class TestTheTrajectoryDerivative:
    @pytest.mark.parametrize("scheme", ["every", "mask"])
    def test_it_is_the_response_to_a_hundredth_of_the_weight(self, scheme: str) -> None:
        model = trained("breast_cancer", 8, 30)
        (train, queries), task = dataset("breast_cancer"), fb.Task(model, loss)
        train, queries = first(train, 120), first(queries, 20)
        settings = {"learning_rate": 0.1, "batch_size": 32, "scheme": scheme}
        amounts = (1, 5, 50)
        further = FurtherTraining(
            amounts=amounts, fraction=0.01, seeds=1, max_seeds=None, **settings
        )
        rows = some_rows(120, 20)
        gold = further.measure(task, train, queries, left_out=rows).gold()
        for epochs, expected in zip(amounts, gold, strict=True):
            fitted = Unrolled(epochs=epochs, **settings).fit(task, train)
            scores = fitted.score(queries).values[:, rows]
            assert min(cosine_similarity(scores, expected)) >= 0.9999
            assert ratio(scores, expected) == pytest.approx(1, abs=0.01)

    @pytest.mark.parametrize("scheme", ["every", "mask"])
    def test_forward_and_backward_agree(self, scheme: str) -> None:
        model = trained("breast_cancer", 8, 30)
        (train, queries), task = dataset("breast_cancer"), fb.Task(model, loss)
        train, queries = first(train, 50), first(queries, 20)
        method = {"learning_rate": 0.1, "epochs": 4.6, "batch_size": 16, "scheme": scheme}
        forward = Unrolled(direction="forward", **method).fit(task, train)
        backward = Unrolled(direction="backward", **method).fit(task, train)
        assert forward.path.steps == 18  # four batches an epoch
        one, other = forward.score(queries).values, backward.score(queries).values
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(
            forward.self_influence(), backward.self_influence(), rtol=1e-10, atol=1e-15
        )
        chosen = Unrolled(**method).fit(task, train)
        assert torch.equal(chosen.score(queries).values, other)  # fewer queries than examples

    def test_one_step_is_graddot_with_the_gradient_at_its_end(self) -> None:
        model = trained("breast_cancer", 8, 30)
        (train, queries), task = dataset("breast_cancer"), fb.Task(model, loss)
        fitted = Unrolled(learning_rate=0.3, epochs=1, batch_size=1000).fit(task, train)
        stepped = {}
        mean = grad(lambda s: loss(lambda x: functional_call(model, s, (x,)), train).mean())
        state = {name: p.detach() for name, p in model.named_parameters()}
        for name, value in mean(state).items():
            stepped[name] = state[name] - 0.3 * value
        after = trained.__wrapped__("breast_cancer", 8, 0)
        after.load_state_dict(stepped)
        products = flat_gradients(after, queries) @ flat_gradients(model, train).T
        expected = torch.as_tensor(0.3 / len(train[0]) * products)
        torch.testing.assert_close(fitted.score(queries).values, expected, rtol=1e-10, atol=1e-15)

    def test_the_gradient_of_the_query_belongs_to_the_end(self) -> None:
        """On a model that is not converged, the gradient where training began misleads."""
        model = trained("diabetes", 8, 3)
        (train, queries), task = dataset("diabetes"), fb.Task(model, loss)
        rows = some_rows(len(train[0]), 20)
        further = FurtherTraining(
            learning_rate=0.1, amounts=(1, 20), fraction=0.01, seeds=1, max_seeds=None
        )
        gold = further.measure(task, train, queries, left_out=rows).gold()
        begin, end = [], []
        for epochs, expected in zip((1, 20), gold, strict=True):
            method = Unrolled(learning_rate=0.1, epochs=epochs)
            changes = Trajectory(method, task, fb.Data.of(train)).forward()[rows].numpy()
            begin.append(mean_cosine(flat_gradients(model, queries) @ changes.T, expected))
            scores = method.fit(task, train).score(queries).values[:, rows]
            end.append(mean_cosine(scores, expected))
        assert min(end) >= 0.999
        assert begin[0] < 0.97
        assert begin[1] < 0.9


class TestWhatThePaperFound:
    """Section by section on two data sets, by cosine with the mean-adjusted gold."""

    @pytest.fixture(scope="class", params=[("breast_cancer", 32, 100), ("digits", 24, 60)])
    @classmethod
    def found(cls, request: pytest.FixtureRequest) -> dict[str, Any]:
        name, width, epochs = request.param
        model = trained(name, width, epochs)
        train, queries = dataset(name)
        queries = first(queries, 40)
        n, task = len(train[0]), fb.Task(model, loss)
        further = FurtherTraining(
            learning_rate=0.1, amounts=(1, 2, 5, 20), adjustment="mean", seeds=2, max_seeds=None
        )
        rows = some_rows(n, 50)
        response = further.measure(task, train, queries, left_out=rows)
        gradients, queried = flat_gradients(model, train), flat_gradients(model, queries)
        curvature = gauss_newton(model, train)
        recommended = np.square(gradients).mean()

        def damped(damping: float) -> np.ndarray:
            matrix = curvature + damping * np.eye(len(curvature))
            return queried @ scipy.linalg.solve(matrix, gradients[rows].T, assume_a="pos")

        lengths = np.linalg.norm(queried, axis=1)[:, None] * np.linalg.norm(gradients[rows], axis=1)
        graddot = queried @ gradients[rows].T
        return {
            "response": response,
            "graddot": graddot,
            "gradcos": graddot / lengths,
            "gauss_newton": damped(100 * recommended),
            "horizon": [damped(1 / horizon) for horizon in response.horizons],
            "large": damped(1e6 * np.trace(curvature)),
        }

    @staticmethod
    def curve(found: dict[str, Any], name: str) -> list[float]:
        """Similarity at each amount."""
        gold = found["response"].gold()
        scores = found[name] if name == "horizon" else [found[name]] * len(gold)
        return [mean_cosine(s, g) for s, g in zip(scores, gold, strict=True)]

    def test_graddot_is_right_at_first_and_then_falls(self, found: dict[str, Any]) -> None:
        curve = self.curve(found, "graddot")
        assert curve[0] >= 0.95
        assert curve[-1] <= curve[0] - 0.25

    def test_a_damped_gauss_newton_starts_below_and_ends_above(self, found) -> None:
        first_order, second_order = self.curve(found, "graddot"), self.curve(found, "gauss_newton")
        assert second_order[0] <= first_order[0] - 0.1
        assert second_order[-1] >= first_order[-1] + 0.2

    def test_damping_matched_to_the_horizon_holds_throughout(self, found) -> None:
        curve, graddot = self.curve(found, "horizon"), self.curve(found, "graddot")
        assert min(curve) >= 0.90
        assert all(a > b for a, b in zip(curve[1:], graddot[1:], strict=True))

    def test_much_damping_is_graddot(self, found) -> None:
        assert mean_cosine(found["large"], found["graddot"]) > 0.99999

    def test_averaging_seeds_does_not_hurt(self, found) -> None:
        response = found["response"]
        single = [mean_cosine(found["graddot"], g) for g in response.per_seed()[0]]
        averaged = self.curve(found, "graddot")
        assert all(a >= s - 0.05 for a, s in zip(averaged, single, strict=True))

    def test_cosines_of_gradients_are_no_substitute(self, found) -> None:
        assert max(self.curve(found, "gradcos")) < 0.5

    def test_every_needs_few_seeds(self, found) -> None:
        assert (found["response"].reliability >= 0.98).all()


def test_the_methods_scores_are_the_measured_response(tmp_path: Path) -> None:
    model, (train, queries) = trained("breast_cancer", 8, 30), dataset("breast_cancer")
    train, queries, task = first(train, 30), first(queries, 6), fb.Task(model, loss)
    for options in (
        {"adjustment": "full", "scheme": "every"},
        {"adjustment": "mean", "scheme": "shift"},
        {"adjustment": "full", "scheme": "mask", "fraction": 0.1},
    ):
        shared = {"learning_rate": 0.1, "batch_size": 7, "seeds": 2, **options}
        method = fb.get("further_training", epochs=3, **shared)
        fitted = method.fit(task, train, batch_size=5)
        further = FurtherTraining(amounts=(3,), max_seeds=None, **shared)
        gold = further.measure(task, train, queries).gold()[0]
        torch.testing.assert_close(fitted.score(queries).values, gold, rtol=0, atol=1e-12)
        own = further.measure(task, train, train).gold()[0].diagonal()
        torch.testing.assert_close(fitted.self_influence(), own, rtol=0, atol=1e-12)
        fitted.save(tmp_path)
        again = fb.load(tmp_path, task, train)
        assert torch.equal(again.score(queries).values, fitted.score(queries).values)


class TestLeaveOneOut:
    @staticmethod
    def recipe() -> fb.Recipe:
        return fb.Recipe(
            lambda: network("breast_cancer", 6), loss, learning_rate=0.1, epochs=5, batch_size=16
        )

    @pytest.mark.parametrize("adjustment", ["full", "mean"])
    def test_it_is_retraining_one_at_a_time(self, adjustment: str, tmp_path: Path) -> None:
        train, queries = (first(part, 25) for part in dataset("breast_cancer"))
        recipe = self.recipe()
        task = fb.Task(recipe.train(train), loss)
        fitted = fb.get("leave_one_out", recipe=recipe, seeds=2, adjustment=adjustment).fit(
            task, train
        )
        expected = torch.zeros(25, 25).double()
        for seed in (0, 1):
            everything = -loss(recipe.train(train, None, seed), queries).detach()
            without = []
            for i in range(25):
                mask = torch.arange(25) != i
                without.append(-loss(recipe.train(train, mask, seed), queries).detach())
            runs = torch.stack(without, 1)
            base = runs.mean(1) if adjustment == "mean" else everything
            expected += (base[:, None] - runs) / 2
        scores = fitted.score(queries)
        torch.testing.assert_close(scores.values, expected, rtol=0, atol=1e-12)
        assert scores.provenance.settings["recipe"]["loss"]["about"]["function"] == "loss"
        own = fitted.score(train).values.diagonal()
        torch.testing.assert_close(fitted.self_influence(), own, rtol=0, atol=1e-12)
        fitted.save(tmp_path)
        again = fb.load(tmp_path, task, train)
        assert torch.equal(again.score(queries).values, scores.values)
        with pytest.raises(fb.errors.TaskError, match="by name only"):
            again.method.fit(task, train)

    def test_what_cannot_be_done_is_refused(self) -> None:
        train, _ = (first(part, 25) for part in dataset("breast_cancer"))
        recipe = self.recipe()
        task = fb.Task(recipe.train(train), loss)
        with pytest.raises(fb.errors.TaskError, match="has no recipe"):
            fb.get("leave_one_out").fit(task, train)
        with pytest.raises(fb.errors.DataError, match="limit is 10"):
            fb.get("leave_one_out", recipe=recipe, limit=10).fit(task, train)
        with pytest.raises(fb.errors.DataError, match="limit is 10"):
            fb.get("further_training", limit=10).fit(task, train)
        other = fb.Task(nn.Linear(30, 2).double(), loss)
        with pytest.raises(fb.errors.TaskError, match="of one architecture"):
            fb.get("leave_one_out", recipe=recipe).fit(other, train)
        with pytest.raises(fb.errors.TaskError, match="seeds is 0"):
            fb.get("leave_one_out", recipe=recipe, seeds=0)


def test_a_model_that_cannot_be_differentiated_is_refused() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network("breast_cancer", 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if float(x.sum()) > -math.inf else x

    with pytest.raises(fb.errors.TaskError, match="cannot differentiate this task"):
        fb.get("unrolled").fit(fb.Task(Stubborn(), loss), dataset("breast_cancer")[0])


def test_training_that_diverges_is_said() -> None:
    train, _ = dataset("diabetes")
    task = fb.Task(network("diabetes", 4), loss)
    with pytest.raises(fb.errors.NonFiniteError, match="diverged within"):
        fb.get("unrolled", learning_rate=1e200, epochs=4).fit(task, train)
    with pytest.raises(fb.errors.NonFiniteError, match="lower learning_rate"):
        fb.get("further_training", learning_rate=1e200).fit(task, first(train, 20))
