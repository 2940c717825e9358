"""D-TRAK and what gradient methods for diffusion share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.curvature import Dense, GramSpectrum, Kronecker, Whole
from forebear.methods.diffusion_gradients import ridge_sweep
from forebear.tasks.diffusion import Denoising
from tests.denoising_cases import DRAWS, LEVELS, SCALARS, N, Net, case, features, kernel


@pytest.mark.parametrize("points", ["mean", "unit"])
@pytest.mark.parametrize("function", list(SCALARS))
def test_scores_are_the_kernel_of_the_features(function: Any, points: Any) -> None:
    task, train, queries = case()
    scores = fb.DTRAK(function=function, points=points).fit(task, train).score(queries).values
    unit = points == "unit"
    told, asked = (features(task, data, SCALARS[function], unit=unit) for data in (train, queries))
    torch.testing.assert_close(scores, kernel(asked, told), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("points", ["mean", "unit"])
def test_the_dual_form_is_the_primal_one(points: Any) -> None:
    task, train, queries = case()
    found = []
    dense = Dense(kind="fisher")
    for curvature in (Whole(dense), GramSpectrum(kind="fisher"), dense):
        method = fb.Influence(
            gradient="square_norm",
            points=points,
            curvature=curvature,
            damping=fb.NonzeroRelative(1.0),
        )
        fitted = method.fit(task, train)
        found.append((fitted.score(queries).values, fitted.self_influence()))
    for scores, own in found[1:]:
        torch.testing.assert_close(scores, found[0][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(own, found[0][1], rtol=1e-9, atol=1e-12)


def test_the_ridge_is_the_mean_of_as_many_eigenvalues_as_there_are_examples() -> None:
    task, train, _ = case()
    told = features(task, train, SCALARS["square_norm"])
    expected = torch.linalg.eigvalsh(told @ told.T / N).mean().item()
    for dimension in (None, 40):  # of 129 parameters, or of a projection that keeps lengths
        fitted = fb.DTRAK(dimension=dimension).fit(task, train)
        used = fitted.details()["damping_used"]["all"]
        assert used == pytest.approx(expected, rel=1e-9 if dimension is None else 0.5)


def test_few_dimensions_count_themselves() -> None:
    task, train, _ = case()
    layers = Kronecker(targets="empirical")
    blocks = fb.Influence(curvature=layers, damping=fb.NonzeroRelative(0.3))
    used = blocks.fit(task, train).details()["damping_used"]
    relative = fb.Influence(curvature=layers, damping=0.3).fit(task, train)
    mean = relative.details()["damping_used"]
    sizes = {"first": 66, "last": 63}
    for name, size in sizes.items():
        assert used[name] == pytest.approx(mean[name] * size / N)
    with pytest.raises(fb.errors.TaskError, match=r"fb\.NonzeroRelative.*number of examples"):
        fb.CG(damping=fb.NonzeroRelative(1.0)).fit(task, train)


def test_a_negative_factor_is_refused() -> None:
    task, train, _ = case()
    with pytest.raises(fb.errors.DataError, match="must be finite and not negative"):
        fb.DTRAK(damping=fb.NonzeroRelative(-1.0)).fit(task, train)


@pytest.mark.parametrize("projection", ["gaussian", "tensor_sketch", "sjlt"])
def test_projected_scores_come_near_whole_ones(projection: Any) -> None:
    task, train, queries = case()
    whole = fb.DTRAK().fit(task, train).score(queries).values
    some = fb.DTRAK(dimension=4096, projection=projection).fit(task, train).score(queries).values
    assert torch.corrcoef(torch.stack([whole.flatten(), some.flatten()]))[0, 1] > 0.97


@pytest.mark.parametrize("method", [fb.DTRAK(), fb.DTRAK(points="unit"), fb.DTRAK(dimension=20)])
def test_batch_size_changes_no_score(method: Any) -> None:
    task, train, queries = case()
    whole = method.fit(task, train).score(queries).values
    small = method.fit(task, train, batch_size=3).score(queries).values
    torch.testing.assert_close(whole, small, rtol=1e-9, atol=1e-12)


def test_saved_and_loaded_it_gives_the_same_scores(tmp_path: Path) -> None:
    task, train, queries = case()
    fitted = fb.DTRAK(points="unit").fit(task, train)
    fitted.save(tmp_path)
    loaded = fb.load(tmp_path, task, train)
    torch.testing.assert_close(loaded.score(queries).values, fitted.score(queries).values)


class Turned(nn.Module):
    """The same network, whose prediction is rewritten as a velocity or a clean image."""

    def __init__(self, net: nn.Module, loss: Denoising) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, noisy: Tensor, levels: Tensor) -> Tensor:
        noise = self.net(noisy, levels)
        signal, strength = self.loss.schedule.at(levels[0].item())
        clean = (noisy - strength * noise) / signal
        return clean if self.loss.prediction == "x0" else signal * noise - strength * clean


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_functions_mean_the_same_whatever_the_network_predicts(prediction: Any) -> None:
    task, train, queries = case()
    turned = Denoising(prediction=prediction, levels=LEVELS, draws=DRAWS)
    other = fb.Task(Turned(task.model, turned), turned)
    expected = fb.DTRAK().fit(task, train).score(queries).values
    torch.testing.assert_close(fb.DTRAK().fit(other, train).score(queries).values, expected)


@pytest.mark.parametrize(
    "method",
    [
        fb.DTRAK(),
        fb.DTRAK(points="unit"),
        fb.DTRAK(dimension=20),
        fb.TRAK(dimension=None),
        replace(fb.DTRAK(), normalise="relative_parameters"),
        fb.DAS(),
        fb.DAS(dimension=20, form="linear"),
    ],
    ids=["dtrak", "unit", "projected", "trak", "relative", "das", "das projected"],
)
def test_a_sweep_over_ridges_is_one_fit_for_each(method: Any) -> None:
    task, train, queries = case()
    fitted = method.fit(task, train)
    ridges = [0.01, fb.NonzeroRelative(1.0), fb.Absolute(0.5)]
    for ridge, scores in zip(ridges, ridge_sweep(fitted, queries, ridges), strict=True):
        expected = fitted.with_damping(ridge).score(queries).values
        torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-12)


def test_a_sweep_needs_eigenvectors() -> None:
    task, train, queries = case()
    with pytest.raises(fb.errors.TaskError, match="does not know its eigenvectors"):
        next(ridge_sweep(fb.GradDot().fit(task, train), queries, [0.1]))
    with pytest.raises(fb.errors.TaskError, match="normalise='none'"):
        next(ridge_sweep(fb.GradCos().fit(task, train), queries, [0.1]))


def test_trak_without_a_projection_is_the_kernel_of_loss_gradients() -> None:
    task, train, queries = case()
    fitted = fb.TRAK(dimension=None, damping=fb.NonzeroRelative(1.0)).fit(task, train)
    scores = fitted.score(queries).values
    told, asked = (features(task, data, SCALARS["loss"]) for data in (train, queries))
    torch.testing.assert_close(scores, kernel(asked, told) / N, rtol=1e-9, atol=1e-12)


def test_a_copy_of_the_query_is_its_strongest_proponent() -> None:
    task, train, queries = case(noise="shared")
    train["image"][5] = queries["image"][2]
    scores = fb.DTRAK().fit(task, train).score(queries)
    assert scores.top(1).ids[2, 0] == 5


def test_a_measurement_takes_the_place_of_the_function_on_queries() -> None:
    task, train, queries = case()
    asked = task.asking(lambda model, batch: -task.objective.function("square_norm")(model, batch))
    expected = fb.DTRAK().fit(task, train).score(queries).values
    torch.testing.assert_close(fb.DTRAK().fit(asked, train).score(queries).values, expected)


def test_what_no_task_knows_is_refused() -> None:
    task, train, _ = case()
    with pytest.raises(fb.errors.UnknownNameError, match="did you mean 'square_norm'"):
        fb.Influence(gradient="square_nrom")
    with pytest.raises(fb.errors.TaskError, match="no weights for gradient='output'"):
        fb.Influence(gradient="output", points="unit")
    plain = fb.Task(Net().double(), lambda model, batch: task.loss(model, batch))
    with pytest.raises(fb.errors.TaskError, match="is a plain loss"):
        fb.DTRAK().fit(plain, train)
