"""The two baselines: what looks alike to the model, and chance."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.tasks.diffusion import Point
from tests.denoising_cases import case

LOSS = fb.losses.cross_entropy


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


TRAIN, QUERIES = points(25, 1), points(6, 2)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("layer", [None, "0"])
def test_similarity_compares_what_a_layer_gets_to_see(metric: Any, layer: str | None) -> None:
    model = network()
    seen = (lambda x: x) if layer == "0" else model[:2]
    q, z = seen(QUERIES[0]).detach(), seen(TRAIN[0]).detach()
    expected = q @ z.T
    if metric == "cosine":
        expected /= q.norm(dim=1)[:, None] * z.norm(dim=1)
    fitted = fb.Similarity(metric=metric, layer=layer).fit(fb.Task(model, LOSS), TRAIN)
    scores = fitted.score(QUERIES)
    assert torch.allclose(scores.values, expected, rtol=1e-10)
    assert scores.provenance.coverage is None
    own = z.square().sum(1) if metric == "dot" else torch.ones(25, dtype=torch.float64)
    assert torch.allclose(fitted.self_influence(), own)


def test_of_a_denoiser_the_least_noisy_level_is_looked_at() -> None:
    """Hidden states by hand, at one level, for schedules whose levels fall and rise."""
    task, train, queries = case()
    model, loss = task.model, task.objective
    for level, settings in ((100, {}), (900, {"level": 900})):
        states = []
        for data in (queries, train):
            noisy = loss.noisy(data, Point(level, 0))  # type: ignore[attr-defined]
            told = torch.cat([noisy.flatten(1), torch.full((len(noisy), 1), level / 1000)], 1)
            states.append(torch.tanh(model.first(told.double())).detach())  # type: ignore[operator]
        q, z = (state / state.norm(dim=1, keepdim=True) for state in states)
        found = fb.Similarity(**settings).fit(task, train).score(queries).values
        torch.testing.assert_close(found, q @ z.T)
    turned = fb.Task(model, fb.losses.Denoising(levels=(900, 100, 500)))
    again = fb.Similarity().fit(turned, train).score(queries).values
    torch.testing.assert_close(again, fb.Similarity().fit(task, train).score(queries).values)


def test_a_level_needs_a_denoising_task() -> None:
    with pytest.raises(fb.errors.TaskError, match="level is 5 and the task's loss has no levels"):
        fb.Similarity(level=5).fit(fb.Task(network(), LOSS), TRAIN)
    task, train, _ = case()
    with pytest.raises(fb.errors.TaskError, match="timestep 1000 does not exist"):
        fb.Similarity(level=1000).fit(task, train)


def test_labels_play_no_part_in_similarity() -> None:
    task = fb.Task(network(), LOSS)
    other = (TRAIN[0], (TRAIN[1] + 1) % 3)
    one, two = (fb.Similarity().fit(task, train).score(QUERIES).values for train in (TRAIN, other))
    assert torch.equal(one, two)


def test_hidden_states_of_sequences_are_averaged_over_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none")

    x = torch.randn(8, 3, 4, dtype=torch.float64)
    data = (x, torch.zeros(8, dtype=torch.long))
    scores = fb.Similarity(metric="dot").fit(fb.Task(model, loss), data).score(data).values
    hidden = model[:2](x).mean(1).detach()
    assert torch.allclose(scores, hidden @ hidden.T, rtol=1e-10)


def test_an_embedding_without_length_is_similar_to_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    x = TRAIN[0].clone()
    x[4] = 0.0
    with pytest.warns(fb.errors.NumericalWarning, match="1 embeddings have a zero"):
        fitted = fb.Similarity().fit(fb.Task(model, LOSS), (x, TRAIN[1]))
    scores = fitted.score(QUERIES).values
    assert (scores[:, 4] == 0).all()
    assert torch.isfinite(scores).all()


def test_half_precision_embeddings_are_compared_in_single() -> None:
    model = network().to(torch.bfloat16)
    train = (TRAIN[0].to(torch.bfloat16), TRAIN[1])
    scores = fb.Similarity().fit(fb.Task(model, LOSS), train).score(train).values
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.diagonal(), torch.ones(25), atol=1e-6)


def test_a_model_without_a_linear_layer_is_asked_for_one() -> None:
    model = nn.Sequential(nn.Conv1d(4, 3, 1), nn.Flatten())
    data = (torch.randn(3, 4, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(fb.errors.TaskError, match=r"no linear layer .*Similarity\(layer="):
        fb.Similarity().fit(fb.Task(model, LOSS), data)
    fitted = fb.Similarity(layer="1").fit(fb.Task(model, LOSS), data)
    assert fitted.score(data).values.shape == (3, 3)


def test_random_scores_are_those_of_their_seed() -> None:
    task = fb.Task(network(), LOSS)
    one, again, other = (fb.Random(seed=seed).fit(task, TRAIN) for seed in (1, 1, 2))
    scores = one.score(QUERIES).values
    assert torch.equal(scores, again.score(QUERIES).values)
    assert not torch.equal(scores, other.score(QUERIES).values)
    assert torch.equal(one.self_influence(), again.self_influence())
    some = (QUERIES[0][:2], QUERIES[1][:2])
    assert torch.equal(one.score(some).values, scores[:2])


def test_random_scores_are_independent_standard_normals() -> None:
    many, few = points(4000, 1), points(5, 2)
    fitted = fb.Random().fit(fb.Task(network(), LOSS), many)
    rows = torch.cat([fitted.score(few).values, fitted.self_influence()[None]])
    error = 5 / 4000**0.5
    assert rows.mean(1).abs().max() < error
    assert (torch.cov(rows) - torch.eye(6)).abs().max() < 2 * error
