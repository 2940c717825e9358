from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forebear.errors import DataError, NonFiniteError, TaskError, UnknownNameError
from forebear.tasks import losses
from forebear.training import Recipe
from forebear.training.schedule import epoch_batches, rate_factor


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def linear() -> nn.Module:
    return nn.Linear(3, 1)


def points(n: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    return x, x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3


def recipe(**changes) -> Recipe:
    settings = {"learning_rate": 0.1, "epochs": 3, "batch_size": 6, **changes}
    return Recipe(linear, losses.squared_error, **settings)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_full_batch_training_is_gradient_descent_by_hand() -> None:
    x, y = points()
    options = {"epochs": 7, "batch_size": 20, "schedule": "linear", "weight_decay": 0.01}
    model = recipe(**options).train((x, y), seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        start = linear()
    theta = weights(start)
    ones = torch.cat([x, torch.ones(20, 1)], 1)
    for step in range(7):
        gradient = ones.T @ (ones @ theta - y) / 20 + 0.01 * theta
        theta = theta - 0.1 * (1 - step / 7) * gradient
    torch.testing.assert_close(weights(model), theta, rtol=0, atol=1e-12)


def test_a_subset_is_the_same_as_a_smaller_dataset_in_full_batches() -> None:
    x, y = points()
    rows = [1, 4, 5, 17]
    part = recipe(batch_size=20).train((x, y), subset=rows)
    alone = recipe(batch_size=20).train((x[rows], y[rows]))
    torch.testing.assert_close(weights(part), weights(alone), rtol=0, atol=1e-12)


def test_training_follows_its_seed_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (recipe().train(points(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert not first.training


def test_an_epoch_sees_every_example_once_in_batches_of_nearly_one_size() -> None:
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(23, dtype=torch.bool)
    mask[[3, 8]] = False
    batches = list(epoch_batches(order, mask, 8))
    assert [len(batch) for batch in batches] == [7, 7, 7]
    assert sorted(torch.cat(batches).tolist()) == [i for i in range(23) if i not in (3, 8)]


def test_all_examples_weigh_the_same_even_when_the_last_batch_is_short() -> None:
    # 13 examples in batches of 12 would leave one alone with the weight of twelve.
    batches = list(epoch_batches(torch.arange(13), torch.ones(13, dtype=torch.bool), 12))
    assert [len(batch) for batch in batches] == [6, 7]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_fall_from_one_towards_zero(schedule: str) -> None:
    factors = [rate_factor(schedule, step, 10) for step in range(10)]
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)
    assert factors[5] == pytest.approx(0.5)
    assert 0 < factors[9] < 0.2


def test_checkpoints_end_at_the_model_and_share_out_the_steps() -> None:
    wanted = recipe(schedule="cosine", epochs=5, batch_size=5)  # 20 steps
    model, checkpoints = wanted.train_with_checkpoints(points(), seed=2, count=4)
    assert torch.equal(weights(model), weights(wanted.train(points(), seed=2)))
    last = checkpoints[-1].load()
    assert all(torch.equal(last[name], value) for name, value in model.state_dict().items())
    rates = [0.1 * rate_factor("cosine", step, 20) for step in range(20)]
    assert [c.learning_rate for c in checkpoints] == pytest.approx(
        [sum(rates[k : k + 5]) / 5 for k in range(0, 20, 5)]
    )
    assert len({float(c.load()["weight"][0, 0]) for c in checkpoints}) == 4


def test_too_many_checkpoints_are_refused() -> None:
    with pytest.raises(TaskError, match="training has 12 steps"):
        recipe().train_with_checkpoints(points(), count=13)


def test_further_training_starts_from_the_model_and_leaves_it_as_it_was() -> None:
    x, y = points()
    model = recipe().train((x, y))
    before = weights(model).clone()
    ones = torch.cat([x, torch.ones(20, 1)], 1)
    further = recipe(batch_size=20).further_train(model, (x, y), epochs=1, learning_rate=0.02)
    step = before - 0.02 * ones.T @ (ones @ before - y) / 20
    torch.testing.assert_close(weights(further), step, rtol=0, atol=1e-12)
    assert torch.equal(weights(model), before)


def test_the_fingerprint_follows_settings_and_architecture() -> None:
    one = recipe()
    assert one.fingerprint == recipe().fingerprint
    assert one.fingerprint != recipe(weight_decay=1e-3).fingerprint
    wider = Recipe(
        lambda: nn.Linear(4, 1), losses.squared_error, learning_rate=0.1, epochs=3, batch_size=6
    )
    assert one.fingerprint != wider.fingerprint


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"optimizer": "adamm"}, UnknownNameError, "did you mean 'adam'"),
        ({"schedule": "cosin"}, UnknownNameError, "did you mean 'cosine'"),
        ({"epochs": 0}, TaskError, "epochs is 0"),
        ({"learning_rate": 0.0}, TaskError, "learning_rate is 0.0"),
    ],
)
def test_wrong_settings_are_refused(change, error, message) -> None:
    with pytest.raises(error, match=message):
        recipe(**change)


def test_bad_training_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="diverged"):
        recipe(learning_rate=1e3, epochs=200).train(points())
    with pytest.raises(DataError, match="empty"):
        recipe().train(points(), subset=torch.zeros(20, dtype=torch.bool))
    mean = Recipe(
        linear,
        lambda model, batch: losses.squared_error(model, batch).mean(),
        learning_rate=0.1,
        epochs=1,
        batch_size=6,
    )
    with pytest.raises(TaskError, match="one value an example"):
        mean.train(points())


def test_the_fingerprint_follows_the_loss() -> None:
    def of(loss: Any) -> str:
        return recipe().with_settings(loss=loss).fingerprint

    def weighted(weight: float) -> Any:
        return lambda model, batch: weight * losses.squared_error(model, batch)

    plain = losses.Denoising()
    assert of(plain.training()) == of(losses.Denoising().training())
    assert of(plain.training()) != of(losses.Denoising(prediction="v").training())
    assert of(weighted(1.0)) == of(weighted(1.0))
    assert of(weighted(1.0)) != of(weighted(2.0))
    assert recipe().settings["loss"] == "squared_error"
