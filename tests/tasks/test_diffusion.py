"""The denoising task: its loss, its noise, what it refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.errors import DataError, TaskError, UnknownNameError
from forebear.tasks.diffusion import Denoising, images
from forebear.tasks.schedules import Continuous, Discrete


class Small(nn.Module):
    """A denoiser of flat images, told the level by one number and the condition by an embedding."""

    def __init__(self, size: int = 6, classes: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(size + 1, 8)
        self.last = nn.Linear(8, size)
        self.embed = nn.Embedding(classes, 8) if classes else None

    def forward(self, noisy: Tensor, level: Tensor, condition: Any = None) -> Tensor:
        hidden = self.first(torch.cat([noisy, level[:, None].to(noisy) / 1000], 1))
        if self.embed is not None:
            hidden = hidden + self.embed(condition)
        return self.last(torch.tanh(hidden))


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small().double()


@pytest.fixture
def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return images(torch.rand(9, 6, generator=generator, dtype=torch.float64) * 2 - 1)


def by_hand(model: nn.Module, batch: Any, loss: Denoising, i: int) -> float:
    """One example's loss, written out for betas 1e-4 to 0.02."""
    cumulative = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    total = []
    for level in loss.levels:
        for draw in range(loss.draws):
            share = cumulative[int(level)]
            point = next(p for p in loss.points if p == (level, draw))
            noise = loss.noise_of(batch, point)[i].numpy()
            image = batch["image"][i].numpy()
            noisy = np.sqrt(share) * image + np.sqrt(1 - share) * noise
            with torch.no_grad():
                said = model(torch.tensor(noisy)[None], torch.tensor([level])).numpy()[0]
            wanted = {
                "epsilon": noise,
                "x0": image,
                "v": np.sqrt(share) * noise - np.sqrt(1 - share) * image,
            }[loss.prediction]
            total.append(np.mean((said - wanted) ** 2))
    return float(np.mean(total))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_loss_is_the_formula(model: Small, batch: Any, prediction: Any) -> None:
    loss = Denoising(prediction=prediction, levels=3, draws=2)
    values = loss(model, batch)
    expected = [by_hand(model, batch, loss, i) for i in range(9)]
    np.testing.assert_allclose(values.detach().numpy(), expected, rtol=1e-12)


def test_edm_weights_the_clean_image(model: Small, batch: Any) -> None:
    loss = Denoising(Continuous(deviation=0.75), "x0", levels=(0.5, 3.0))
    total = torch.zeros(9, dtype=torch.float64)
    for sigma, point in zip((0.5, 3.0), loss.points, strict=True):
        noisy = batch["image"] + sigma * loss.noise_of(batch, point)
        said = model(noisy, torch.full((9,), sigma, dtype=torch.float64))
        weight = (sigma**2 + 0.75**2) / (sigma * 0.75) ** 2
        total += weight * (said - batch["image"]).square().mean(1) / 2
    torch.testing.assert_close(loss(model, batch), total)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_clean_image_is_found_from_a_perfect_prediction(batch: Any, prediction: Any) -> None:
    loss = Denoising(prediction=prediction, levels=(10, 900))
    for point in loss.points:
        noise = loss.noise_of(batch, point)
        noisy = loss.noisy(batch, point)
        perfect = loss.target(batch["image"], noise, point.level)
        torch.testing.assert_close(loss.clean(noisy, perfect, point.level), batch["image"])


def test_levels_share_their_noise_with_other_choices(batch: Any) -> None:
    many, few = Denoising(levels=(50, 150, 250)), Denoising(levels=(150,))
    assert torch.equal(many.noise_of(batch, many.points[1]), few.noise_of(batch, few.points[0]))
    shared = Denoising(levels=(150,), noise="shared").noise_of(batch, few.points[0])
    assert torch.equal(shared[0], shared[5])
    assert not torch.equal(shared, few.noise_of(batch, few.points[0]))


def test_losses_do_not_depend_on_batches(model: Small, batch: Any) -> None:
    loss = Denoising(levels=4)
    whole = loss(model, batch)
    some = {name: column[[7, 2]] for name, column in batch.items()}
    torch.testing.assert_close(loss(model, some), whole[[7, 2]], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["graddot", "ekfac", "trak", "exact"])
def test_scores_are_those_of_per_example_gradients(model: Small, batch: Any, name: str) -> None:
    """`graddot` against gradients one at a time; the others run and agree with themselves."""
    loss = Denoising(levels=3)
    task = fb.Task(model, loss)
    queries = {**batch, "key": batch["key"] + 100}
    method = fb.EKFAC(targets="empirical") if name == "ekfac" else fb.get(name)
    scores = method.fit(task, batch).score(queries).values
    assert torch.isfinite(scores).all()
    if name != "graddot":
        again = method.fit(task, batch, batch_size=4).score(queries).values
        torch.testing.assert_close(scores, again, rtol=1e-3, atol=1e-6)
        return

    def gradients(data: Any) -> Tensor:
        found = []
        for i in range(9):
            one = {key: column[i : i + 1] for key, column in data.items()}
            parts = torch.autograd.grad(loss(model, one).sum(), list(model.parameters()))
            found.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(found)

    torch.testing.assert_close(scores, gradients(queries) @ gradients(batch).T)


def test_sampled_targets_have_the_gauss_newton_matrix(model: Small, batch: Any) -> None:
    """The mean square of the gradient at drawn targets is the second derivative of the loss."""
    loss = Denoising(levels=2)
    outputs = loss.outputs(model, batch).detach()
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros_like(outputs)
    for _ in range(2000):
        targets, weights = loss.sample(outputs, batch, generator)
        leaf = outputs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss.loss_at(leaf, batch, targets, weights).sum(), leaf)
        total += gradient.square() / 2000
    second = 2 / (outputs.shape[1] * outputs.shape[2])  # of Σ squares / count
    assert total.mean().item() == pytest.approx(second, rel=0.01)


def test_conditions_reach_the_network() -> None:
    torch.manual_seed(0)
    model = Small(classes=3)
    pixels, labels = torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    loss = Denoising(levels=2)
    one, other = loss(model, images(pixels, labels)), loss(model, images(pixels, labels * 0))
    assert torch.equal(one[[0, 3]], other[[0, 3]])
    assert not torch.allclose(one[1:3], other[1:3])


def test_bad_input_is_named(model: Small, batch: Any) -> None:
    with pytest.raises(UnknownNameError, match="prediction 'noise'"):
        Denoising(prediction="noise")  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="clean image: use prediction='x0'"):
        Denoising(Continuous())
    with pytest.raises(TaskError, match="timestep 1000"):
        Denoising(levels=(1000,))
    with pytest.raises(TaskError, match=r"timestep 3\.5"):
        Denoising(levels=(3.5,))
    with pytest.raises(TaskError, match="noise scale 0"):
        Denoising(Continuous(), "x0", levels=(0.0,))
    with pytest.raises(TaskError, match="not betas"):
        Discrete.of(torch.linspace(1e-4, 0.02, 10))
    with pytest.raises(DataError, match="uint8"):
        images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(DataError, match="2 of 2 images reach up to 255"):
        images(torch.full((2, 3), 255.0))
    with pytest.raises(DataError, match=r"keys of shape \(1,\) were given for 2"):
        images(torch.zeros(2, 3), keys=[1])
    with pytest.raises(DataError, match="'image' and 'key'"):
        Denoising()(model, (batch["image"], batch["key"]))
    with pytest.raises(TaskError, match="learned variance"):
        Denoising(call=lambda m, x, t, c: torch.cat([x, x], 1))(model, batch)


def test_the_clearest_level_still_has_noise() -> None:
    assert Denoising().clearest == 50
    assert Denoising(levels=(900, 0, 100)).clearest == 0
    clean = Discrete.of(torch.tensor([1.0, 0.9, 0.2, 0.0]).double())
    assert Denoising(clean, levels=(3, 0, 1, 2)).clearest == 1
    assert Denoising(clean, levels=(3, 0)).clearest == 3
    edm = Denoising(Continuous(), "x0", levels=(80.0, 0.002, 0.02, 3.0))
    assert edm.clearest == 0.002


def test_schedules_run_from_image_to_noise() -> None:
    for schedule in (Discrete.linear(), Discrete.cosine()):
        signals = [schedule.at(level)[0] for level in schedule.levels(10)]
        assert signals == sorted(signals, reverse=True)
        for level in schedule.levels(5):
            signal, noise = schedule.at(level)
            assert signal**2 + noise**2 == pytest.approx(1)
    sigmas = Continuous().levels(5)
    assert sigmas[0] == pytest.approx(0.002)
    assert sigmas[-1] == pytest.approx(80)
