"""MUCS against unlearning and losses written out for one query at a time."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import forebear as fb
from forebear.methods.mucs import FittedMUCS
from forebear.methods.mucs.forgetting import Visits
from forebear.methods.mucs.scales import Scales
from forebear.tasks.diffusion import Denoising, images
from forebear.tasks.noise import gaussian
from forebear.tasks.schedules import Continuous, Discrete
from forebear.zoo.denoisers import Denoiser

# A network as small as this is not always forgotten in so many steps; that has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore::forebear.errors.NumericalWarning")

N, Q, SHAPE, DEVIATION = 30, 3, (1, 4, 4), 0.75
SCHEDULE = Continuous(DEVIATION, most=20.0)
LOSS = Denoising(SCHEDULE, "x0", levels=4)
OPTIONS: dict[str, Any] = {
    "layers": ("hidden.*",),
    "learning_rate": 1e-2,
    "batch_size": 16,
    "stop": 0.75,
    "window": 5,
    "levels": 5,
    "max_steps": 130,
}


def drawn(n: int, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Images that are one of two patterns each, with a bit of noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.tensor([1.0, -1.0]).repeat(2, 8).double()
    patterns[1] = patterns[1].view(4, 4).T.reshape(-1).sort().values
    pick = torch.arange(n) % 2
    noise = 0.3 * torch.randn(n, 16, generator=generator, dtype=torch.float64)
    return images((patterns[pick] + noise).view(n, *SHAPE).to(dtype))


def build() -> nn.Module:
    return Denoiser(SHAPE, 24, form="clean", deviation=DEVIATION).double()


TRAIN, QUERIES = drawn(N, 1), drawn(Q, 2)
RECIPE = fb.Recipe(
    build,
    LOSS.training(),
    optimizer="adam",
    learning_rate=3e-3,
    epochs=150,
    batch_size=15,
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return RECIPE.train(TRAIN)


@pytest.fixture
def task(model: nn.Module) -> fb.Task:
    return fb.Task(model, LOSS)


def mucs(**options: Any) -> fb.MUCS:
    return fb.MUCS(**{**OPTIONS, **options})


def weighted(model: nn.Module, image: Tensor, noise: Tensor, scale: Tensor) -> Tensor:
    """EDM's loss `[b]` of noise scales `[b]`."""
    clean = model(image + scale.view(-1, 1, 1, 1) * noise, scale)
    weight = (scale**2 + DEVIATION**2) / (scale * DEVIATION) ** 2
    return weight * ((clean - image) ** 2).mean((1, 2, 3))


def unlearned(model: nn.Module, fitted: FittedMUCS, query: Tensor) -> tuple[nn.Module, int]:
    """A copy that has forgotten an image, and the steps it took; torch's own AdamW, one query."""
    method, visits = fitted.method, fitted._visits()
    model = copy.deepcopy(model)
    hidden = [layer.weight for layer in model.hidden]  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(hidden, lr=method.learning_rate, weight_decay=0.01)
    seen: list[float] = []
    for step in range(method.max_steps + 1):
        visit = visits.at(step)
        count = method.batch_size
        scale = visit.levels.told
        kept = weighted(model, visit.retained["image"], visit.noise[:count], scale[:count])
        asked = weighted(model, query.expand(count, *SHAPE), visit.noise[count:], scale[count:])
        asked = torch.minimum(asked, torch.tensor(fitted.null, dtype=asked.dtype))
        seen.append(asked.mean().item())
        if sum(seen[-5:]) / len(seen[-5:]) >= 0.75 * fitted.null:
            return model, step
        optimizer.zero_grad()
        (kept.mean() - 0.2 * asked.mean()).backward()
        optimizer.step()
    return model, method.max_steps


def bank_losses(model: nn.Module, fitted: FittedMUCS) -> Tensor:
    """Losses `[n, levels]` at one noise a level for all images."""
    count = fitted.method.levels
    grid = torch.linspace(20.0 ** (1 / 7), 0.002 ** (1 / 7), int(count / 0.7)) ** 7
    found = []
    for number in range(count):
        noise = gaussian(torch.zeros(1).long(), SHAPE, 0, 14.0, number, dtype=torch.float64)
        scale = grid[number].double().expand(N)
        found.append(weighted(model, TRAIN["image"], noise, scale))
    return torch.stack(found, 1).detach()


def test_scores_are_those_of_unlearning_one_query_after_the_other(task: fb.Task) -> None:
    fitted = mucs().fit(task, TRAIN)
    scores = fitted.score(QUERIES)
    steps = []
    for q in range(Q):
        after, count = unlearned(task.model, fitted, QUERIES["image"][q])
        before_losses, after_losses = bank_losses(task.model, fitted), bank_losses(after, fitted)
        ratio = (after_losses - before_losses) / (after_losses + before_losses + 1e-3)
        torch.testing.assert_close(scores.values[q], ratio.mean(1), rtol=1e-4, atol=1e-6)
        steps.append(count)
    told = scores.provenance.settings["unlearning"]
    assert told["steps"] == steps
    assert len(set(steps)) > 1  # so that some stop while others go on
    assert all(told["converged"])
    assert min(told["forgotten"]) >= 0.75 * fitted.null
    assert scores.values.abs().max() < 1


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_any_network_is_compared_by_its_clean_image(prediction: Any) -> None:
    schedule, generator = Discrete.linear(), torch.Generator().manual_seed(3)
    model = Denoiser(SHAPE, 8, form="plain").double()
    loss = Denoising(schedule, prediction)
    scales = Scales(loss, 0.5)
    image, noise = TRAIN["image"], torch.randn(N, *SHAPE, generator=generator).double()
    wanted = torch.linspace(0.02, 60.0, N, dtype=torch.float64)
    levels = scales.levels(wanted)
    values = scales.losses(model, TRAIN, levels, noise)
    for i in range(N):
        share = schedule.signal[int(levels.told[i])]
        sigma = ((1 - share) / share) ** 0.5
        other = [((1 - s) / s) ** 0.5 for s in schedule.signal]
        nearest = min(other, key=lambda s: abs(torch.log(s / wanted[i])))
        assert sigma == pytest.approx(nearest)
        noisy = share**0.5 * image[i] + (1 - share) ** 0.5 * noise[i]
        said = model(noisy[None], levels.told[i : i + 1])[0]
        clean = {
            "epsilon": (noisy - (1 - share) ** 0.5 * said) / share**0.5,
            "v": share**0.5 * noisy - (1 - share) ** 0.5 * said,
            "x0": said,
        }[prediction]
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        expected = weight * ((clean - image[i]) ** 2).mean()
        assert values[i].item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_bound_is_the_loss_of_an_untrained_edm_network(task: fb.Task) -> None:
    known = mucs().fit(task, TRAIN).null
    measured = mucs(null=RECIPE, batch_size=100).fit(task, TRAIN).null
    assert known == pytest.approx(measured, rel=0.02)
    assert mucs(null=0.7).fit(task, TRAIN).null == 0.7


def test_nothing_unlearned_is_a_score_of_exactly_zero(task: fb.Task) -> None:
    fitted = mucs(max_steps=0).fit(task, TRAIN)
    with pytest.warns(fb.errors.NumericalWarning, match="not forgotten in 0 steps"):
        assert (fitted.score(QUERIES).values == 0).all()


def test_the_model_stays_as_it_is(task: fb.Task) -> None:
    task.model.zero_grad()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    fitted = mucs().fit(task, TRAIN)
    assert fitted.names == ("hidden.0.weight", "hidden.1.weight")
    assert fitted.coverage == pytest.approx(24 / 25)
    fitted.score(QUERIES)
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in task.model.parameters())


def test_batches_and_other_queries_change_no_score(model: nn.Module) -> None:
    model = copy.deepcopy(model).float()
    train, queries = drawn(N, 1, torch.float32), drawn(Q, 2, torch.float32)
    task = fb.Task(model, LOSS)
    whole = mucs().fit(task, train).score(queries).values
    small = mucs().fit(task, train, batch_size=7).score(queries).values
    assert (whole - small).abs().max() < 1e-5
    alone = {key: value[1:2] for key, value in queries.items()}
    single = mucs().fit(task, train).score(alone).values
    assert (whole[1] - single[0]).abs().max() < 1e-3  # rounding grows over the steps


def test_the_order_of_training_images_plays_no_part(task: fb.Task) -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = {key: value[order] for key, value in TRAIN.items()}
    scores = mucs().fit(task, TRAIN).score(QUERIES).values
    permuted = mucs().fit(task, shuffled).score(QUERIES).values
    torch.testing.assert_close(scores[:, order], permuted, rtol=1e-9, atol=1e-12)


def test_copies_of_the_query_are_its_proponents(task: fb.Task) -> None:
    queries = {key: value[:8] for key, value in TRAIN.items()}
    scores = mucs(levels=20).fit(task, TRAIN).score(queries).values
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    assert (ranks < N // 4).all()
    same = torch.arange(N) % 2 == (torch.arange(8) % 2)[:, None]  # the query's own pattern
    assert (scores[same].mean() - scores[~same].mean()) > 0.05


def test_few_levels_rank_as_many_do(task: fb.Task) -> None:
    many = mucs(levels=100).fit(task, TRAIN).score(QUERIES).values
    few = mucs(levels=10).fit(task, TRAIN).score(QUERIES).values
    ranks = [np.asarray(spearmanr(a, b))[0] for a, b in zip(many, few, strict=True)]
    assert min(ranks) >= 0.9


def test_fresh_noise_and_plain_differences_are_options(task: fb.Task) -> None:
    plain = mucs(ratio=False).fit(task, TRAIN)
    rise = plain.score(QUERIES).values
    assert (rise - mucs().fit(task, TRAIN).score(QUERIES).values).abs().max() > 1e-3
    fresh = mucs(consistent=False, max_steps=0).fit(task, TRAIN)
    scores = fresh.score(QUERIES).values
    assert scores.std() > 0.01  # noise alone moves the losses


def test_without_a_retained_batch_the_rest_is_forgotten_too(task: fb.Task) -> None:
    kept = mucs().fit(task, TRAIN).unlearn(QUERIES)
    lost = mucs(retain=False).fit(task, TRAIN).unlearn(QUERIES)
    assert (lost.retained > kept.retained).all()
    free = mucs(clamp=False).fit(task, TRAIN).unlearn(QUERIES)
    assert (free.steps <= kept.steps).all()


def test_runs_that_fail_are_told(task: fb.Task) -> None:
    ids = [f"image-{i}" for i in range(Q)]
    slow = mucs(learning_rate=1e-6, max_steps=3).fit(task, TRAIN)
    with pytest.warns(fb.errors.NumericalWarning, match="image-0, image-1, image-2 were not"):
        scores = slow.score(QUERIES, ids=ids)
    assert not any(scores.provenance.settings["unlearning"]["converged"])
    hasty = mucs(learning_rate=0.3).fit(task, TRAIN)
    with pytest.warns(fb.errors.NumericalWarning, match="fewer than 20 steps"):
        hasty.top(QUERIES, k=2)


def test_all_layers_must_be_asked_for(task: fb.Task) -> None:
    with pytest.raises(fb.errors.TaskError, match="every weight matrix"):
        mucs(layers=None).fit(task, TRAIN)
    assert len(mucs(layers=("*",)).fit(task, TRAIN).names) == 5
    chosen = fb.Task(task.model, LOSS, layers="hidden.1")
    assert mucs(layers=None).fit(chosen, TRAIN).names == ("hidden.1.weight",)
    norm = nn.ModuleDict({"net": copy.deepcopy(task.model), "norm": nn.LayerNorm(3)})
    with pytest.raises(fb.errors.TaskError, match="no weight matrix"):
        mucs(layers=("norm",)).fit(fb.Task(norm, LOSS), TRAIN)


def test_bad_input_is_refused(task: fb.Task) -> None:
    with pytest.raises(fb.errors.TaskError, match="not the loss of a diffusion model"):
        mucs().fit(fb.Task(task.model, fb.losses.cross_entropy), TRAIN)
    with pytest.raises(fb.errors.DataError, match="'image' and 'key'"):
        mucs().fit(task, (TRAIN["image"],))
    broken = {**TRAIN, "image": TRAIN["image"].clone()}
    broken["image"][17] = float("nan")
    with pytest.raises(fb.errors.NonFiniteError, match="17"):
        mucs().fit(task, broken)
    fitted = mucs().fit(task, TRAIN)
    with pytest.raises(
        fb.errors.DataError, match=r"\(1, 5, 5\), the training set's has \(1, 4, 4\)"
    ):
        fitted.score(images(torch.zeros(2, 1, 5, 5).double()))
    told = images(QUERIES["image"], torch.zeros(Q).long())
    with pytest.raises(fb.errors.DataError, match="queries have 'condition' and the training set"):
        fitted.score(told)
    bad = {**QUERIES, "image": QUERIES["image"].clone()}
    bad["image"][1] = float("inf")
    with pytest.raises(fb.errors.NonFiniteError, match="ids 1"):
        fitted.score(bad)


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("levels", 0),
        ("levels", 2.5),
        ("max_steps", -1),
        ("keep", 0.0),
        *((option, value) for option in ("learning_rate", "stop") for value in (0.0, INFINITE)),
        ("learning_rate", float("nan")),
        ("weight_decay", -1.0),
        ("spread", INFINITE),
        ("location", INFINITE),
        ("deviation", INFINITE),
        ("stop", 1),
        ("stop", 2.0),
    ],
)
def test_options_that_cannot_work_are_refused(option: str, value: float) -> None:
    with pytest.raises(fb.errors.TaskError, match=f"{option} is {value}: "):
        mucs(**{option: value})


def test_without_a_bound_a_run_may_go_beyond_it(task: fb.Task) -> None:
    far = mucs(clamp=False, stop=1.5).fit(task, TRAIN)
    told = far.unlearn(QUERIES)
    assert told.converged.all()
    assert (told.forgotten >= 1.5 * far.null).all()


@pytest.mark.parametrize("consistent", [True, False])
def test_a_query_that_the_model_knows_nothing_of_has_no_scores(
    task: fb.Task, tmp_path: Path, consistent: bool
) -> None:
    """Noise is not what the model learnt: its loss begins beyond the bound."""
    strange = {key: value.clone() for key, value in QUERIES.items()}
    generator = torch.Generator().manual_seed(5)
    strange["image"][1] = 4 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    fitted = mucs(consistent=consistent).fit(task, TRAIN)
    ids = ["a", "b", "c"]
    with pytest.warns(fb.errors.NumericalWarning) as caught:
        scores = fitted.score(strange, ids=ids)
    (about,) = (str(one.message) for one in caught)
    assert "no better on queries b than one that knows nothing" in about
    assert "nothing to forget" in about
    told = scores.provenance.settings["unlearning"]
    assert told["known"] == [True, False, True]
    assert told["converged"] == [True, False, True]
    assert told["steps"][1] == 0
    assert told["forgotten"][1] >= 0.75 * fitted.null
    assert (scores.values[1] == 0).all()
    assert (scores.values[[0, 2]].std(1) > 0.01).all()
    plain = mucs(consistent=consistent).fit(task, TRAIN).score(QUERIES)
    torch.testing.assert_close(scores.values[[0, 2]], plain.values[[0, 2]], rtol=1e-9, atol=1e-12)
    # What comes after goes on, without it.
    other = fb.Random().fit(task, TRAIN).score(strange, ids=ids)
    with pytest.warns(fb.errors.NumericalWarning, match="has no part in theirs"):
        both = fb.combine([scores, other])
    assert torch.equal(both.values[1].argsort(), other.values[1].argsort())
    fitted.score_to(strange, tmp_path / "blocks", ids=ids)
    few = mucs(consistent=consistent).fit(task, strange)
    assert few.self_influence()[1] == 0


def test_each_image_is_told_its_own_condition(model: nn.Module) -> None:
    torch.manual_seed(0)
    told = Denoiser(SHAPE, 24, conditions=2, form="clean", deviation=DEVIATION).double()
    nn.init.normal_(told.out.weight, std=0.1)
    labels = torch.eye(2, dtype=torch.float64)[torch.arange(N) % 2]
    task = fb.Task(told, LOSS)
    with pytest.raises(fb.errors.TaskError, match="is told a condition"):
        mucs().fit(task, TRAIN)
    method = mucs(max_steps=5, null=9.0)
    fitted = method.fit(task, {**TRAIN, "condition": labels})
    one = fitted.score({**QUERIES, "condition": labels[:Q]}).values
    other = fitted.score({**QUERIES, "condition": labels[:Q].flip(1)}).values
    assert (one - other).abs().max() > 1e-6


class Stubborn(nn.Module):
    """A network that looks at its values, which stacked ones do not allow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, noisy: Tensor, levels: Tensor) -> Tensor:
        assert levels.min().item() > 0
        said = self.inner(noisy, levels)
        return said if said.sum().item() < 1e9 else said * 0


def test_networks_that_cannot_be_stacked_are_unlearned_one_by_one(model: nn.Module) -> None:
    options = {"layers": ("inner.hidden.*",)}
    slow = mucs(**options).fit(fb.Task(Stubborn(model).eval(), LOSS), TRAIN)
    with pytest.warns(fb.errors.ForebearWarning, match="unlearned one at a time"):
        scores = slow.score(QUERIES).values
    fast = mucs().fit(fb.Task(model, LOSS), TRAIN).score(QUERIES).values
    torch.testing.assert_close(scores, fast, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cheap", [fb.NDA(patch=3), fb.Similarity()], ids=["nda", "cosine"])
def test_a_cascade_scores_only_what_a_cheap_method_kept(task: fb.Task, cheap: Any) -> None:
    cascade = fb.Cascade([cheap, mucs()], keep=[6]).fit(task, TRAIN)
    found = cascade.top(QUERIES, k=4)
    scores = mucs().fit(task, TRAIN).score(QUERIES).values
    near = cheap.fit(task, TRAIN).top(QUERIES, k=6).ids
    for q in range(Q):
        best = sorted(near[q], key=lambda i: -scores[q, i])[:4]
        assert list(found.ids[q]) == best
        torch.testing.assert_close(found.values[q], scores[q, best])
    assert found.provenance is not None
    told = found.provenance.settings["stages"][1]["unlearning"]
    assert told["converged"] == [True] * Q


def test_self_influence_is_the_diagonal(task: fb.Task) -> None:
    few = {key: value[:5] for key, value in TRAIN.items()}
    fitted = mucs().fit(task, few)
    own = fitted.score(few).values.diagonal()
    torch.testing.assert_close(fitted.self_influence(), own, rtol=1e-6, atol=1e-9)


def test_saved_and_loaded_it_gives_the_same_scores(task: fb.Task, tmp_path: Path) -> None:
    fitted = mucs(null=RECIPE).fit(task, TRAIN)
    fitted.save(tmp_path)
    loaded = fb.load(tmp_path, task, TRAIN)
    torch.testing.assert_close(
        loaded.score(QUERIES).values, fitted.score(QUERIES).values, rtol=1e-9, atol=1e-12
    )


def test_steps_see_the_same_whatever_the_query(task: fb.Task) -> None:
    fitted = mucs().fit(task, TRAIN)
    visits = fitted._visits()
    assert isinstance(visits, Visits)
    first, again, other = visits.at(3), visits.at(3), visits.at(4)
    assert torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, other.noise)
    count = fitted.method.batch_size
    assert not torch.equal(first.noise[:count], first.noise[count:])
