"""Attribution by unlearning: paired noise, the limit of small steps, its Fisher matrix, sign."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, jvp

import forebear as fb
from forebear.data import Data
from forebear.errors import DataError, NonFiniteError, NumericalWarning, TaskError, UnknownNameError
from forebear.methods.unlearned import FEW, Forgotten
from forebear.methods.unlearning_step import PairedLosses, changed, weights_of
from forebear.tasks.diffusion import Denoising, images
from forebear.tasks.noise import moments
from forebear.tasks.schedules import Continuous
from forebear.zoo import digits_diffusion
from forebear.zoo.denoisers import Denoiser

N, Q = 150, 6
KEYS_OF_QUERIES = 10_000


class Attention(nn.Module):
    """Cross-attention of an image's rows to the tokens of a caption `[b, 3, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(24, 16, bias=False)
        self.to_k = nn.Linear(8, 16, bias=False)
        self.to_v = nn.Linear(8, 24, bias=False)

    def forward(self, state: Tensor, caption: Tensor) -> Tensor:
        weights = (self.to_q(state) @ self.to_k(caption).mT / 4).softmax(-1)
        return state + weights @ self.to_v(caption)


class Captioned(nn.Module):
    """A denoiser of 8 × 8 images that reads a caption by cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(9, 24)
        self.attn2 = Attention()
        self.mixed = nn.Linear(8, 8)
        self.out = nn.Linear(24, 8)

    def forward(self, noisy: Tensor, levels: Tensor, caption: Any) -> Tensor:
        level = (levels / 1000).to(noisy).view(-1, 1, 1).expand(-1, 8, 1)
        state = self.attn2(self.inside(torch.cat([noisy[:, 0], level], 2)), caption.to(noisy))
        state = state + self.mixed(torch.tanh(state).mT).mT
        return self.out(torch.tanh(state))[:, None]


KV = ("attn2.to_k", "attn2.to_v")


def digits() -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    found = digits_diffusion.load(train=N, queries=Q)
    train, queries = (data.batch(slice(0, len(data))) for data in (found.train, found.queries))
    embedded = torch.randn(10, 3, 8, generator=torch.Generator().manual_seed(5))
    labels = torch.as_tensor(found.labels), torch.as_tensor(found.query_labels)
    return (
        images(train["image"].float(), embedded[labels[0]]),
        images(
            queries["image"].float(),
            embedded[labels[1]],
            keys=KEYS_OF_QUERIES + torch.arange(Q),
        ),
        labels[0],
    )


CAPTIONED, CAPTIONED_QUERIES, LABELS = digits()
TRAIN, QUERIES = (
    {name: data[name] for name in ("image", "key")} for data in (CAPTIONED, CAPTIONED_QUERIES)
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    recipe = fb.Recipe(
        lambda: Denoiser((1, 8, 8), 64),
        Denoising().training(),
        optimizer="adam",
        learning_rate=2e-3,
        epochs=100,
        batch_size=50,
    )
    return recipe.train(TRAIN)


def trained_on(captioned: dict[str, Any], epochs: int) -> nn.Module:
    recipe = fb.Recipe(
        Captioned,
        Denoising().training(),
        optimizer="adam",
        learning_rate=3e-3,
        epochs=epochs,
        batch_size=50,
    )
    return recipe.train(captioned)


@pytest.fixture(scope="module")
def captioned() -> nn.Module:
    return trained_on(CAPTIONED, 100)


def doubled(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def wide(data: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if v.is_floating_point() else v for k, v in data.items()}


def fitted(model: nn.Module, train: Any = None, **options: Any) -> Any:
    task = fb.Task(model, Denoising(levels=5))
    chosen = {"query_draws": 256, "fisher_draws": 2, **options}
    return fb.get("abu", **chosen).fit(task, TRAIN if train is None else train)


def with_options(fit: Any, **options: Any) -> Any:
    again = copy.copy(fit)
    again.method = dataclasses.replace(fit.method, **options)
    return again


def rank_correlations(a: Tensor, b: Tensor) -> np.ndarray:
    return np.array([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])


def test_a_subset_scores_as_a_slice_of_everything_to_the_bit(model: nn.Module) -> None:
    fit = fitted(model, mode="step", levels=7, draws=2)
    whole = fit.score(QUERIES).values
    for positions in (torch.tensor([3]), torch.arange(0, N, 7), torch.arange(60, N)):
        part = fit.restricted(positions)
        part._kept = {}  # losses before, too
        part.batch_size = 9
        assert torch.equal(part.score(QUERIES).values, whole[:, positions])


def test_losses_have_the_same_bits_in_any_order(model: nn.Module) -> None:
    task = fb.Task(model, Denoising(levels=6, draws=2))
    losses, weights = PairedLosses(task), weights_of(task, fitted(model).plan)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    data = Data(TRAIN)

    def all_of(data: Data) -> Tensor:
        return torch.cat([values[0, 0] for _, values in losses.at([weights], data)])

    assert torch.equal(all_of(data)[order], all_of(data.select(order)))


def test_losses_are_those_of_the_task(model: nn.Module) -> None:
    schedule = Continuous(0.75, most=20.0)
    clean = Denoiser((1, 8, 8), 16, form="clean").double()
    nn.init.normal_(clean.out.weight, std=0.1)
    for loss, net in (
        (Denoising(levels=9, draws=2), doubled(model)),
        (Denoising(schedule, "x0", levels=9, draws=2), clean),
    ):
        task = fb.Task(net, loss)
        weights = {name: value.detach() for name, value in net.named_parameters()}
        parts = [v[0, 0] for _, v in PairedLosses(task).at([weights], Data(wide(TRAIN)))]
        torch.testing.assert_close(torch.cat(parts), task.losses(net, wide(TRAIN)).detach())


def test_without_a_change_nothing_changes(model: nn.Module) -> None:
    fit = fitted(model, mode="step")
    still = Forgotten(torch.zeros(2, fit._size), torch.ones(2))
    for _, values in fit.against_training([(still, torch.ones(()))]):
        assert not values.any()


@pytest.mark.parametrize("curvature", ["ekfac", "diagonal"])
def test_steps_rank_as_their_limit_does(captioned: nn.Module, curvature: str) -> None:
    task = fb.Task(captioned, Denoising(levels=5))
    method = fb.AbU(curvature=curvature, query_draws=512, layers=KV)
    fit = method.fit(task, CAPTIONED)
    linear = fit.score(CAPTIONED_QUERIES).values
    for change in (0.001, 0.003, 0.01):
        step = with_options(fit, mode="step", change=change).score(CAPTIONED_QUERIES).values
        assert rank_correlations(step, linear).mean() >= 0.99, change


def test_the_default_step_of_all_weights_ranks_as_its_limit(model: nn.Module) -> None:
    fit = fitted(model)
    linear, step = fit.score(QUERIES).values, with_options(fit, mode="step").score(QUERIES).values
    assert rank_correlations(step, linear).mean() >= 0.99
    # Both are effects of one query, so they agree in size too.
    assert step.norm() / linear.norm() == pytest.approx(1, abs=0.2)


def test_other_noise_before_and_after_leaves_nothing(model: nn.Module) -> None:
    fit = fitted(model)
    linear = fit.score(QUERIES).values
    weights = weights_of(fit.task, fit.plan)
    other = fb.Task(model, Denoising(levels=5, seed=1))
    before = torch.cat([v[0, 0] for _, v in PairedLosses(fit.task).at([weights], fit.train)])
    states = [changed(weights, change, fit.plan) for change in fit.forgotten(QUERIES).changes]
    after = torch.cat([v[0] for _, v in PairedLosses(other).at(states, fit.train)], 1)
    assert np.abs(rank_correlations(after - before, linear)).mean() < 0.35


@pytest.mark.parametrize("curvature", ["ekfac", "diagonal"])
def test_linear_scores_are_the_derivative_along_the_step(model: nn.Module, curvature: str) -> None:
    net = doubled(model)
    fit = fitted(net, wide(TRAIN), curvature=curvature)
    linear = fit.score(wide(QUERIES)).values
    forgotten = fit.forgotten(wide(QUERIES))
    weights = weights_of(fit.task, fit.plan)

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch: Any) -> Tensor:
            return Denoising(levels=5)(self.net, batch)

    for q, change in enumerate(forgotten.changes):
        after = changed(weights, change, fit.plan)
        tangents = {name: after[name] - weights[name] for name in weights}

        def value(state: dict[str, Tensor]) -> Tensor:
            named = {f"net.{name}": value for name, value in state.items()}
            return functional_call(Losses(), named, (wide(TRAIN),))

        _, slope = jvp(value, (weights,), (tangents,))
        torch.testing.assert_close(
            linear[q] * forgotten.alphas[q], slope, rtol=1e-5, atol=1e-5 * slope.abs().max().item()
        )


def test_kept_gradients_and_passes_score_alike(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = fitted(doubled(model), wide(TRAIN), flips="max")
    kept = fit.score(wide(QUERIES)).values
    assert "gradients" in fit._kept
    monkeypatch.setattr("forebear.methods.unlearned.KEPT_BYTES", 0)
    fit._kept.clear()
    torch.testing.assert_close(fit.score(wide(QUERIES)).values, kept, rtol=1e-9, atol=1e-12)
    assert "gradients" not in fit._kept


def test_the_diagonal_is_the_mean_of_squared_gradients(captioned: nn.Module) -> None:
    net, few = doubled(captioned), {k: v[:12] for k, v in wide(CAPTIONED).items()}
    loss = Denoising(levels=5)
    method = fb.AbU(curvature="diagonal", fisher_draws=3, query_draws=8, layers=KV, seed=4)
    fit = method.fit(fb.Task(net, loss), few)
    squares = {f"{name}.weight": 0.0 for name in KV}
    training = loss.training()
    for visit in range(3):
        stamped = {**few, "moment": moments(few["key"], 4, visit)}
        for i in range(12):
            one = {name: column[i : i + 1] for name, column in stamped.items()}
            chosen = [net.get_parameter(name) for name in squares]
            grads = torch.autograd.grad(training(net, one).sum(), chosen)
            for name, g in zip(squares, grads, strict=True):
                squares[name] = squares[name] + g.square() / 36
    eigenvalues = fit.curvatures[0].source.eigenvalues
    for name, expected in squares.items():
        torch.testing.assert_close(eigenvalues[name], expected)


@pytest.mark.parametrize("mode", ["linear", "step"])
def test_a_training_copy_of_the_query_ranks_first(model: nn.Module, mode: str) -> None:
    few = {k: v[:8].clone() for k, v in TRAIN.items()}
    few["key"] += KEYS_OF_QUERIES  # with noise of its own
    fit = fitted(model, mode=mode, levels=10, draws=3, query_draws=2048)
    scores = fit.score(few).values
    own = scores.diagonal()
    assert (own > 0).all()
    ranks = (scores > own[:, None]).sum(1)
    assert ranks.float().median() == 0
    assert ranks.max() <= 0.1 * N


def test_copies_with_the_caption_of_the_query_are_told_from_others() -> None:
    """Copies of an image with its caption and with another's: pixels cannot tell them apart."""
    generator, count = torch.Generator().manual_seed(3), 3
    noise = 0.05 * torch.randn(count * 16, 1, 8, 8, generator=generator)
    copies = CAPTIONED_QUERIES["image"][:count].repeat_interleave(16, 0) + noise
    own = CAPTIONED_QUERIES["condition"][:count]
    other = torch.randn(count, 3, 8, generator=generator)
    captions = torch.stack([own, other], 1).repeat_interleave(8, 1).flatten(0, 1)
    train = images(
        torch.cat([CAPTIONED["image"], copies]), torch.cat([CAPTIONED["condition"], captions])
    )
    task = fb.Task(trained_on(train, 150), Denoising(levels=20, draws=5))
    few = {name: column[:count] for name, column in CAPTIONED_QUERIES.items()}
    found = fb.AbU(query_draws=2048).fit(task, train).top(few, k=8).ids
    first = N + 16 * np.arange(count)[:, None]
    assert ((first <= found) & (found < first + 8)).mean() >= 0.9
    assert not ((first + 8 <= found) & (found < first + 16)).any()


def test_a_step_raises_the_loss_of_the_query(model: nn.Module) -> None:
    fit = fitted(model)
    weights = weights_of(fit.task, fit.plan)
    states = [changed(weights, change, fit.plan) for change in fit.forgotten(QUERIES).changes]
    losses = PairedLosses(fb.Task(model, Denoising(levels=40)))
    values = torch.cat([v[0] for _, v in losses.at([weights, *states], Data(QUERIES))], 1)
    assert (values[1:].diagonal() > values[0]).all()
    length = torch.stack([value.square().sum() for value in weights.values()]).sum().sqrt()
    lengths = fit.forgotten(QUERIES).changes.norm(dim=1) / length
    torch.testing.assert_close(lengths, torch.full((Q,), 0.003), rtol=1e-4, atol=0)


def test_only_the_layers_that_were_named_change(captioned: nn.Module) -> None:
    task = fb.Task(captioned, Denoising(levels=3))
    fit = fb.AbU(layers=("*.to_k", "*.to_v"), query_draws=16).fit(task, CAPTIONED)
    assert list(fit.plan.blocks) == [f"{name}.weight" for name in KV]
    assert 0 < fit.coverage < 0.5
    with pytest.raises(UnknownNameError, match=r"attn3"):
        fb.AbU(layers=("*.attn3.to_k",)).fit(task, CAPTIONED)


@pytest.mark.parametrize("mode", ["linear", "step"])
def test_mirrored_images_count_by_their_larger_or_mean_score(model: nn.Module, mode: str) -> None:
    plain = fitted(doubled(model), wide(TRAIN), mode=mode)
    turned = copy.copy(plain)
    turned._kept = {}
    turned.train = Data({**wide(TRAIN), "image": wide(TRAIN)["image"].flip(-1)})
    turned.training = [turned.stream(0, turned.train)]
    both = torch.stack([fit.score(wide(QUERIES)).values for fit in (plain, turned)])
    for flips, expected in (("max", both.amax(0)), ("mean", both.mean(0))):
        again = with_options(plain, flips=flips)
        again._kept = {}
        torch.testing.assert_close(again.score(wide(QUERIES)).values, expected)


def test_boxes_share_out_the_gradient(model: nn.Module) -> None:
    """The mean over the image is the mean of those over its halves."""
    net = doubled(model)
    fit = fitted(net, wide(TRAIN))
    whole = fit._query().gradients(Data(wide(QUERIES)))
    halves = [
        with_options(fit, box=box)._query().gradients(Data(wide(QUERIES)))
        for box in ((0, 0, 8, 4), (0, 4, 8, 8))
    ]
    torch.testing.assert_close(sum(halves), 2 * whole)
    assert not torch.allclose(*halves)
    with pytest.raises(DataError, match=r"does not lie in images of shape \(1, 8, 8\)"):
        with_options(fit, box=(0, 0, 9, 4)).score(wide(QUERIES))


def test_several_steps_go_where_one_goes_when_they_are_short(model: nn.Module) -> None:
    fit = fitted(model, mode="step", change=0.002, query_draws=1024)
    one = fit.score(QUERIES).values
    four = with_options(fit, steps=4).score(QUERIES).values
    assert rank_correlations(one, four).min() > 0.95
    assert not torch.equal(one, four)


def test_few_queries_are_unlearned_and_many_are_not(model: nn.Module) -> None:
    fit = fitted(model, mode="auto")
    few = {name: column[:FEW] for name, column in QUERIES.items()}
    step = with_options(fit, mode="step").score(few).values
    assert torch.equal(fit.score(few).values, step)
    linear = with_options(fit, mode="linear").score(QUERIES).values
    torch.testing.assert_close(fit.score(QUERIES).values, linear)
    top = fit.top(few, k=3).values
    torch.testing.assert_close(top, step.sort(descending=True).values[:, :3])


def test_any_loss_can_be_unlearned() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(60, generator=generator) > 0).long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    task = fb.Task(net, fb.losses.cross_entropy)
    influence = fb.EKFAC(targets="empirical", rank=None).fit(task, (x, y)).score((x[:5], y[:5]))
    fit = fb.AbU().fit(task, (x, y))
    linear = fit.score((x[:5], y[:5]))
    torch.testing.assert_close(linear.values, influence.values)
    assert linear.provenance.units == "removal"
    step = with_options(fit, mode="step", change=1e-4).score((x[:5], y[:5])).values
    torch.testing.assert_close(step, influence.values, rtol=0.02, atol=1e-6)
    small = with_options(fit, mode="step", alpha=1e-4).score((x[:5], y[:5])).values
    torch.testing.assert_close(small, influence.values, rtol=1e-3, atol=1e-8)
    for options in ({"levels": 3}, {"flips": "max"}, {"box": (0, 0, 1, 1)}):
        with pytest.raises(TaskError, match=f"{next(iter(options))}="):
            fb.get("abu", **options).fit(task, (x, y))


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    net = copy.deepcopy(model).train()
    net.out.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit = fitted(net, mode="step", steps=2)
    broken = {**QUERIES, "image": QUERIES["image"].clone()}
    broken["image"][3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"ids q3"):
        fit.score(broken, ids=[f"q{i}" for i in range(Q)])
    fit.task.loss.call = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit.score(QUERIES)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["out.weight"]
    assert net.training


def test_an_image_that_is_not_finite_is_named(model: nn.Module) -> None:
    broken = {**TRAIN, "image": TRAIN["image"].clone()}
    broken["image"][70] = float("inf")
    task = fb.Task(model, Denoising(levels=2))
    with pytest.raises(NonFiniteError, match="seventy"):
        fb.AbU(query_draws=8).fit(
            task, broken, ids=[str(i) if i != 70 else "seventy" for i in range(N)]
        )


def test_steps_that_drown_in_rounding_are_said_to(model: nn.Module) -> None:
    with pytest.warns(NumericalWarning, match="losses rise by"):
        fitted(model, mode="step", change=1e-6).score(QUERIES)
    half = copy.deepcopy(model).bfloat16()
    narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in TRAIN.items()}
    queries = {k: v.bfloat16() if v.is_floating_point() else v for k, v in QUERIES.items()}
    method = fb.AbU(query_draws=32, fisher_draws=1, mode="step", change=1e-4)
    with pytest.warns(NumericalWarning) as caught:
        method.fit(fb.Task(half, Denoising(levels=2)), narrow).score(queries)
    assert any("rounding of the weights" in str(warning.message) for warning in caught)


def test_saved_and_loaded_it_scores_the_same(model: nn.Module, tmp_path: Path) -> None:
    fit = fitted(model, mode="step", levels=(50, 450), draws=2, flips="mean", box=(0, 0, 8, 4))
    fit.save(tmp_path)
    again = fb.load(tmp_path, fb.Task(model, Denoising(levels=5)), TRAIN)
    assert again.method == fit.method
    assert torch.equal(again.score(QUERIES).values, fit.score(QUERIES).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": fb.Influence().curvature}, "needs 'ekfac'"),
        ({"change": 0.0}, "change is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"steps": 3}, "use mode='step'"),
        ({"query_draws": 0}, "query_draws is 0"),
        ({"box": (0, 4, 8, 4)}, "is empty"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        fb.get("abu", **options)


def test_unknown_choices_come_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'ekfac'"):
        fb.AbU(curvature="ekfak")
    with pytest.raises(UnknownNameError, match="mode"):
        fb.get("abu", mode="steps")


def test_random_noise_scales_are_those_of_training() -> None:
    """For networks of EDM the law is an option, as of the loss they were trained with."""
    schedule = Continuous(0.75, most=20.0)
    net = Denoiser((1, 8, 8), 12, form="clean", deviation=0.75).double()
    nn.init.normal_(net.out.weight, std=0.1)
    loss = Denoising(schedule, "x0", levels=3)
    options = {"query_draws": 40, "fisher_draws": 3, "curvature": "diagonal", "seed": 2}
    few = {k: v[:10] for k, v in wide(TRAIN).items()}
    ask = {k: v[:1] for k, v in wide(QUERIES).items()}
    fit = fb.AbU(location=-2.0, spread=0.3, **options).fit(fb.Task(net, loss), few)  # type: ignore[arg-type]
    training = loss.training(location=-2.0, spread=0.3)
    parameters = list(net.parameters())
    stamped = {k: v.expand(40, *v.shape[1:]) for k, v in ask.items()}
    stamped["moment"] = moments(stamped["key"], 2, 2**32 + torch.arange(40))
    found = torch.autograd.grad(training(net, stamped).mean(), parameters)
    blocks = fit._query().gradients(Data(ask))[0]
    assert blocks.norm().item() == pytest.approx(
        torch.stack([g.square().sum() for g in found]).sum().sqrt().item()
    )
    total = torch.zeros((), dtype=torch.float64)
    for visit in range(3):
        for i in range(10):
            one = {k: v[i : i + 1] for k, v in few.items()}
            one["moment"] = moments(one["key"], 2, visit)
            grads = torch.autograd.grad(training(net, one).sum(), parameters)
            total = total + torch.stack([g.square().sum() for g in grads]).sum() / 30
    diagonal = torch.stack([v.sum() for v in fit.curvatures[0].source.eigenvalues.values()]).sum()
    assert diagonal.item() == pytest.approx(total.item())
    other = fb.AbU(**options).fit(fb.Task(net, loss), few)  # type: ignore[arg-type]
    assert not torch.allclose(other._query().gradients(Data(ask))[0], blocks)
    for option in ({"spread": -1.0}, {"location": float("nan")}):
        with pytest.raises(TaskError, match=r"location is .* and spread"):
            fb.AbU(**option)  # type: ignore[arg-type]


def test_the_record_says_how_far_each_query_was_forgotten(model: nn.Module) -> None:
    fit = fitted(model, mode="step", steps=2)
    scores = fit.score(QUERIES, ids=[f"q{i}" for i in range(Q)])
    told = scores.provenance.settings["unlearning"]
    assert told["forgotten"] == [True] * Q
    assert all(a > b for a, b in zip(told["after"], told["before"], strict=True))
    torch.testing.assert_close(
        torch.tensor(told["alpha"]), fit.forgotten(QUERIES).alphas, rtol=1e-5, atol=0
    )
    assert fit.top(QUERIES, k=2).provenance.settings["unlearning"] == told
    linear = with_options(fit, mode="linear", steps=1).score(QUERIES)
    assert "unlearning" not in linear.provenance.settings
    # Down instead of up: as a step does that is too long.
    query, changes = fit._query(), fit.forgotten(QUERIES).changes
    assert (query.losses(Data(QUERIES), -changes) < query.losses(Data(QUERIES))).all()
    backwards = Forgotten(-changes, torch.ones(Q))
    with pytest.warns(NumericalWarning, match="did not raise the loss of queries 0, 1, 2"):
        fit._look_back(Data(QUERIES), backwards)
    assert not any(fit.told(Data(QUERIES))["unlearning"]["forgotten"])
