import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor
from torch.nn import functional as F

from forebear.errors import DataError, ForebearWarning, NonFiniteError, TaskError
from forebear.tasks import losses
from forebear.training import Ensemble, Recipe, ensemble, stacked


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SEEDS = [0, 1, 2, 0, 1, 5]


def blobs(n: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 6, generator=generator), torch.arange(n) % 3


def uneven_subsets(n: int = 50) -> Tensor:
    """From three examples, less than a batch, to all; several share a number of steps."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(len(SEEDS), n, dtype=torch.bool)
    for mask, size in zip(masks, (3, 17, 20, 22, 43, n), strict=True):
        mask[torch.randperm(n, generator=generator)[:size]] = True
    return masks


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs)


OPTIMIZERS = {
    "sgd": {"learning_rate": 0.1, "weight_decay": 0.01},
    "momentum": {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "adam": {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
}


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_ensemble_equals_training_one_at_a_time(options, schedule, monkeypatch) -> None:
    monkeypatch.setattr(stacked, "TRACE_AFTER", 2)
    recipe = Recipe(mlp, losses.cross_entropy, epochs=4, batch_size=8, schedule=schedule, **options)
    masks = uneven_subsets()
    together = recipe.train_many(blobs(), masks, SEEDS)
    for model, mask, seed in zip(together.models(), masks, SEEDS, strict=True):
        assert difference(model, recipe.train(blobs(), mask, seed)) < 1e-10


def test_the_size_of_a_chunk_changes_nothing(monkeypatch) -> None:
    recipe = Recipe(mlp, losses.cross_entropy, learning_rate=0.1, epochs=3, batch_size=8)
    one = recipe.train_many(blobs(), uneven_subsets(), 0)
    monkeypatch.setattr(stacked, "CHUNK", 1)
    other = recipe.train_many(blobs(), uneven_subsets(), 0)
    for name, value in one.state.items():
        torch.testing.assert_close(other.state[name], value, rtol=0, atol=1e-12)


def test_the_loss_is_traced_once_and_not_called_at_every_step(monkeypatch) -> None:
    monkeypatch.setattr(stacked, "TRACE_AFTER", 20)
    calls = []

    def loss(model: nn.Module, batch) -> Tensor:
        calls.append(1)
        return losses.cross_entropy(model, batch)

    recipe = Recipe(mlp, loss, learning_rate=0.1, epochs=20, batch_size=10)
    masks = torch.ones(3, 50, dtype=torch.bool)
    together = recipe.train_many(blobs(), masks, 0)  # 100 steps
    assert len(calls) < 30
    assert difference(together.model(0), recipe.train(blobs())) < 1e-10


def test_a_model_that_cannot_be_traced_is_still_stacked(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no trace")

    monkeypatch.setattr(proxy_tensor, "make_fx", refuse)
    monkeypatch.setattr(stacked, "TRACE_AFTER", 0)
    recipe = Recipe(mlp, losses.cross_entropy, learning_rate=0.1, epochs=2, batch_size=8)
    masks = uneven_subsets()
    together = recipe.train_many(blobs(), masks, SEEDS)
    for model, mask, seed in zip(together.models(), masks, SEEDS, strict=True):
        assert difference(model, recipe.train(blobs(), mask, seed)) < 1e-10


class Convolutional(nn.Module):
    """Convolution, norm, a tied and a frozen weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)
        self.head.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x[:, None]).mean(2)) * self.scale
        return self.head(self.second(F.gelu(self.first(h))))


def test_convolutions_tied_and_frozen_weights_equal_the_loop(monkeypatch) -> None:
    monkeypatch.setattr(stacked, "TRACE_AFTER", 2)
    recipe = Recipe(
        Convolutional,
        losses.cross_entropy,
        optimizer="adam",
        learning_rate=0.01,
        epochs=3,
        batch_size=8,
    )
    masks = uneven_subsets()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForebearWarning)
        together = recipe.train_many(blobs(), masks, SEEDS)
    for model, mask, seed in zip(together.models(), masks, SEEDS, strict=True):
        assert model.second.weight is model.first.weight
        assert difference(model, recipe.train(blobs(), mask, seed)) < 1e-10


def data_dependent(model: nn.Module, batch) -> Tensor:
    loss = losses.cross_entropy(model, batch)
    return loss * 2 if loss.mean().item() > 0 else loss


UNSTACKABLE = {
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)), losses.cross_entropy),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), losses.cross_entropy),
    "data dependent": (mlp, data_dependent),
}


@pytest.mark.parametrize(("build", "loss"), UNSTACKABLE.values(), ids=UNSTACKABLE)
def test_what_cannot_be_stacked_is_trained_in_a_loop_after_a_warning(build, loss) -> None:
    recipe = Recipe(build, loss, learning_rate=0.1, epochs=2, batch_size=8)
    masks = uneven_subsets()[1:3]
    with pytest.warns(ForebearWarning, match="one at a time"):
        together = recipe.train_many(blobs(), masks, [3, 4])
    for model, mask, seed in zip(together.models(), masks, [3, 4], strict=True):
        assert difference(model, recipe.train(blobs(), mask, seed)) == 0


def test_a_list_of_examples_is_stacked_too() -> None:
    x, y = blobs()
    recipe = Recipe(mlp, losses.cross_entropy, learning_rate=0.1, epochs=2, batch_size=8)
    examples = [(x[i], int(y[i])) for i in range(len(x))]
    one, other = (recipe.train_many(data, uneven_subsets(), 0) for data in (examples, (x, y)))
    for name, value in one.state.items():
        torch.testing.assert_close(other.state[name], value, rtol=0, atol=1e-12)


def test_evaluation_equals_that_of_each_member(monkeypatch) -> None:
    recipe = Recipe(mlp, losses.cross_entropy, learning_rate=0.1, epochs=1, batch_size=8)
    together = recipe.train_many(blobs(), uneven_subsets(), SEEDS)
    monkeypatch.setattr(ensemble, "EVALUATION", 14)  # two members and seven examples at a time
    values = together.evaluate(losses.cross_entropy, blobs(), batch_size=7)
    expected = torch.stack([losses.cross_entropy(m, blobs()) for m in together.models()])
    torch.testing.assert_close(values, expected.detach(), rtol=0, atol=1e-12)
    with pytest.warns(ForebearWarning, match="evaluated one at a time"):
        looped = together.evaluate(data_dependent, blobs())
    torch.testing.assert_close(looped, 2 * expected.detach(), rtol=0, atol=1e-12)


def test_models_of_another_shape_are_not_stacked() -> None:
    with pytest.raises(TaskError, match="differ in their parameters"):
        Ensemble.of([nn.Linear(2, 1), nn.Linear(3, 1)])


def test_divergence_and_wrong_counts_are_named() -> None:
    wild = {"learning_rate": 1e200, "weight_decay": 1.0}
    recipe = Recipe(mlp, losses.cross_entropy, epochs=5, batch_size=8, **wild)
    with pytest.raises(NonFiniteError, match="diverged: 6 of 6 models"):
        recipe.train_many(blobs(), uneven_subsets(), 0)
    with pytest.raises(DataError, match="2 seeds were given for 6 subsets"):
        recipe.train_many(blobs(), uneven_subsets(), [0, 1])
    mean = Recipe(
        mlp,
        lambda model, batch: losses.cross_entropy(model, batch).mean(),
        learning_rate=0.1,
        epochs=1,
        batch_size=8,
    )
    with pytest.raises(TaskError, match="one value an example"):
        mean.train_many(blobs(), uneven_subsets(), 0)
