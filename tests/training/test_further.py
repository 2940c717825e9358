"""Further training with and without examples, compared with plain loops over one model each."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.errors import (
    DataError,
    ForebearWarning,
    MismatchError,
    NonFiniteError,
    NumericalWarning,
    TaskError,
    UnknownNameError,
)
from forebear.tasks import losses
from forebear.training import FurtherTraining, Response, stacked

N, Q = 23, 4
CLASSES = 3
LEFT_OUT = [0, 5, 22, 11]
EPOCHS = 3


def blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    return torch.randn(n, 5, generator=generator).double() + y[:, None], y


TRAIN, QUERIES = blobs(N, 0), blobs(Q, 1)


def mlp(*, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).to(dtype).eval()


def task(model: nn.Module | None = None) -> fb.Task:
    return fb.Task(mlp() if model is None else model, losses.cross_entropy)


def cross_entropies(model: nn.Module, rows: list[int]) -> Tensor:
    logits = model(TRAIN[0][rows])
    return -torch.log_softmax(logits, 1)[torch.arange(len(rows)), TRAIN[1][rows]]


def cuts(size: int, batch_size: int, short_last: bool) -> list[tuple[int, int]]:
    if short_last:
        return [(i, min(i + batch_size, size)) for i in range(0, size, batch_size)]
    steps = -(-size // batch_size)
    return [(size * k // steps, size * (k + 1) // steps) for k in range(steps)]


def make_optimizer(model: nn.Module, options: dict[str, Any]) -> torch.optim.Optimizer:
    options = dict(options)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[
        options.pop("optimizer", "sgd")
    ]
    return kind(model.parameters(), lr=options.pop("learning_rate"), **options)


def one_run(
    group: list[int],
    seed: int,
    scheme: str,
    options: dict[str, Any],
    *,
    fraction: float = 1.0,
    short_last: bool = False,
    clip: float | None = None,
    batch_size: int = 6,
) -> list[Tensor]:
    """Queries' measurements after each epoch of one model, `EPOCHS` times `[q]`."""
    model = mlp()
    optimizer = make_optimizer(model, options)
    generator = torch.Generator().manual_seed(seed)
    measured = []
    for _ in range(EPOCHS):
        order = torch.randperm(N, generator=generator).tolist()
        if scheme == "shift":
            order = [i for i in order if i not in group]
        for start, stop in cuts(len(order), batch_size, short_last):
            batch = order[start:stop]
            weights = torch.ones(len(batch)).double()
            if scheme == "mask":
                weights = torch.tensor(
                    [1 - fraction * (i in group) for i in batch], dtype=torch.float64
                )
            loss = (weights * cross_entropies(model, batch)).sum() / weights.sum()
            if scheme == "every" and group:
                loss = loss - fraction / N * cross_entropies(model, group).sum()
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        with torch.no_grad():
            log = torch.log_softmax(model(QUERIES[0]), 1)
            measured.append(log[torch.arange(Q), QUERIES[1]])
    return measured


def gold_by_loops(groups: list[list[int]], seeds: range, *args: Any, **named: Any) -> Tensor:
    """`[amounts, q, m]`, full-run adjustment."""
    each = []
    for seed in seeds:
        full = torch.stack(one_run([], seed, *args, **named))
        runs = [torch.stack(one_run(group, seed, *args, **named)) for group in groups]
        each.append(torch.stack([full - run for run in runs], 2))
    return torch.stack(each).mean(0)


def further(**options: Any) -> FurtherTraining:
    chosen = {"learning_rate": 0.1, "batch_size": 6, "max_seeds": None, "amounts": (1, 2, 3)}
    return FurtherTraining(**{**chosen, **options})


OPTIMIZERS = {
    "sgd": {"learning_rate": 0.1},
    "momentum": {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "adam": {"optimizer": "adam", "learning_rate": 0.01},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
}


@pytest.mark.parametrize("scheme", ["every", "mask", "shift"])
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_schemes_equal_plain_loops(options, scheme, monkeypatch) -> None:
    monkeypatch.setattr(stacked, "TRACE_AFTER", 3)
    monkeypatch.setattr(stacked, "CHUNK", 3)
    response = further(scheme=scheme, **options).measure(task(), TRAIN, QUERIES, left_out=LEFT_OUT)
    expected = gold_by_loops([[i] for i in LEFT_OUT], range(2), scheme, options)
    assert response.gold().dtype == torch.float64
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(response.gold(), expected, rtol=0, atol=1e-12)
    assert response.left_out.tolist() == LEFT_OUT
    assert response.steps == (4, 8, 12)
    assert response.horizons == tuple(options["learning_rate"] * t for t in (4, 8, 12))


GROUPS = [[1, 2], [7], [3, 9, 20]]


@pytest.mark.parametrize("scheme", ["every", "mask", "shift"])
def test_groups_short_batches_and_clipping_equal_plain_loops(scheme: str) -> None:
    options = {"learning_rate": 0.2}
    response = further(scheme=scheme, short_last=True, clip=0.3, seeds=1, **options).measure(
        task(), TRAIN, QUERIES, left_out=GROUPS
    )
    expected = gold_by_loops(
        GROUPS, range(1), scheme, options, short_last=True, clip=0.3, batch_size=6
    )
    torch.testing.assert_close(response.gold(), expected, rtol=0, atol=1e-12)
    assert response.groups == ((1, 2), (7,), (3, 9, 20))
    assert response.scores(1).train_ids.tolist() == ["group 0", "group 1", "group 2"]
    with pytest.raises(DataError, match="groups of several"):
        _ = response.left_out


@pytest.mark.parametrize("scheme", ["every", "mask"])
def test_a_part_of_the_weight_is_removed_and_the_effect_is_that_of_the_whole(scheme: str) -> None:
    options = {"learning_rate": 0.1}
    response = further(scheme=scheme, fraction=0.01, **options).measure(
        task(), TRAIN, QUERIES, left_out=LEFT_OUT
    )
    expected = gold_by_loops([[i] for i in LEFT_OUT], range(2), scheme, options, fraction=0.01)
    torch.testing.assert_close(response.gold(), expected / 0.01, rtol=0, atol=1e-10)


def test_the_mean_adjustment_subtracts_the_mean_over_runs() -> None:
    options = {"learning_rate": 0.1}
    response = further(adjustment="mean").measure(task(), TRAIN, QUERIES, left_out=LEFT_OUT)
    expected = gold_by_loops([[i] for i in LEFT_OUT], range(2), "every", options)
    expected = expected - expected.mean(2, keepdim=True)
    torch.testing.assert_close(response.gold(), expected, rtol=0, atol=1e-12)
    assert torch.equal(response.gold("mean"), response.gold())
    full = response.gold("full")
    torch.testing.assert_close(full - full.mean(2, keepdim=True), expected, rtol=0, atol=1e-12)


class Stubborn(nn.Module):
    """The same network, with control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if float(x.sum()) > -1e9 else x


@pytest.mark.parametrize("scheme", ["every", "mask", "shift"])
def test_models_that_cannot_be_stacked_give_the_same_numbers(scheme: str) -> None:
    method = further(scheme=scheme, clip=0.5, seeds=1)
    together = method.measure(task(), TRAIN, QUERIES, left_out=LEFT_OUT)
    with pytest.warns(ForebearWarning, match="one at a time"):
        single = method.measure(task(Stubborn()), TRAIN, QUERIES, left_out=LEFT_OUT)
    torch.testing.assert_close(single.gold(), together.gold(), rtol=0, atol=1e-12)


def test_examples_with_a_collate_of_their_own_give_the_same_numbers() -> None:
    method = further(seeds=1)
    expected = method.measure(task(), TRAIN, QUERIES, left_out=LEFT_OUT)
    pairs = [(TRAIN[0][i].float(), int(TRAIN[1][i])) for i in range(N)]
    stackable = (TRAIN[0].float(), TRAIN[1])
    expected = method.measure(task(), stackable, QUERIES, left_out=LEFT_OUT)

    def collate(items: list[Any]) -> tuple[Tensor, Tensor]:
        return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])

    data = fb.Data(pairs, collate=collate)
    with pytest.warns(ForebearWarning, match="not made of tensors"):
        response = method.measure(task(), data, QUERIES, left_out=LEFT_OUT)
    torch.testing.assert_close(response.gold(), expected.gold(), rtol=0, atol=1e-12)


class Noisy(nn.Module):
    """Dropout and batch norm."""

    def __init__(self, *, stubborn: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(6, CLASSES)
        self.stubborn = stubborn
        self.norm.running_mean += 0.3
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.stubborn and float(x.sum()) < -1e9:
            return x
        return self.last(self.drop(self.norm(self.first(x)).tanh()))


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.filterwarnings("ignore:models are trained one at a time")
def test_dropout_is_off_or_shared_and_statistics_stay(stubborn: bool) -> None:
    model = Noisy(stubborn=stubborn)
    before = copy.deepcopy(model.state_dict())
    off = further(seeds=1).measure(task(model), TRAIN, QUERIES, left_out=LEFT_OUT)
    shared = further(seeds=1, dropout="shared").measure(
        task(model), TRAIN, QUERIES, left_out=LEFT_OUT
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.allclose(off.full, shared.full, atol=1e-3)
    # With masks of their own, runs would differ from the full one as much as seeds do.
    again = further(seeds=1, seed=1, dropout="shared").measure(
        task(model), TRAIN, QUERIES, left_out=LEFT_OUT
    )
    between = (again.full - shared.full).abs().mean()
    assert shared.gold().abs().mean() < 0.5 * between
    repeated = further(seeds=1, dropout="shared").measure(
        task(model), TRAIN, QUERIES, left_out=LEFT_OUT
    )
    torch.testing.assert_close(repeated.gold(), shared.gold(), rtol=0, atol=1e-13)


def weighted(model: nn.Module, batch: Any) -> Tensor:
    x, y, weight = batch
    return weight * losses.cross_entropy(model, (x, y))


def test_an_example_without_weight_scores_exactly_zero() -> None:
    weight = torch.ones(N).double()
    weight[5] = 0
    queries = (*QUERIES, torch.ones(Q).double())
    response = further().measure(
        fb.Task(mlp(), weighted), (*TRAIN, weight), queries, left_out=LEFT_OUT
    )
    gold = response.gold()
    assert (gold[..., LEFT_OUT.index(5)] == 0).all()
    assert (gold[..., LEFT_OUT.index(11)] != 0).all()


def test_parameters_without_gradient_are_named_and_stay() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.idle = mlp(), nn.Linear(2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    options = {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
    method = further(**options)
    response = method.measure(task(Idle()), TRAIN, QUERIES, left_out=LEFT_OUT)
    assert response.settings["excluded"] == ["idle.weight", "idle.bias"]
    plain = method.measure(task(), TRAIN, QUERIES, left_out=LEFT_OUT)
    torch.testing.assert_close(response.gold(), plain.gold(), rtol=0, atol=1e-13)


def test_seeds_are_added_until_the_gold_is_reliable() -> None:
    easy = further(max_seeds=8, reliability=0.9).measure(task(), TRAIN, QUERIES, left_out=LEFT_OUT)
    assert easy.seeds == (0, 1)
    assert (easy.reliability >= 0.9).all()
    noisy = further(scheme="shift", seeds=2, max_seeds=8, reliability=0.95, seed=3)
    hard = noisy.measure(task(), TRAIN, QUERIES, left_out=LEFT_OUT)
    assert 2 < len(hard.seeds) < 8
    assert hard.seeds[0] == 3
    assert (hard.reliability >= 0.95).all()
    with pytest.warns(NumericalWarning, match="was asked for"):
        further(scheme="shift", seeds=2, max_seeds=3, reliability=0.999).measure(
            task(), TRAIN, QUERIES, left_out=LEFT_OUT
        )
    single = further(seeds=1).measure(task(), TRAIN, QUERIES, left_out=LEFT_OUT)
    assert np.isnan(single.reliability).all()
    assert easy.reliability_by("spearman").shape == (3,)


def test_a_response_is_saved_and_read_again(tmp_path: Path) -> None:
    response = further().measure(
        task(), TRAIN, QUERIES, left_out=["c", "a"], ids=[chr(97 + i) for i in range(N)]
    )
    response.save(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = Response.load(tmp_path, model=task().model_hash())
    assert torch.equal(again.gold(), response.gold())
    assert again.settings == response.settings
    assert again.left_out.tolist() == [2, 0]
    scores = again.scores(2)
    assert scores.train_ids.tolist() == ["c", "a"]
    assert scores.provenance.units == "removal"
    assert torch.equal(scores.values, response.gold()[1])
    again.require_match(fb.GradDot().fit(task(), TRAIN).score(QUERIES))
    with pytest.raises(MismatchError, match="queries differs"):
        again.require_match(fb.GradDot().fit(task(), TRAIN).score(TRAIN))
    with pytest.raises(MismatchError, match="belongs to model"):
        Response.load(tmp_path, model="other")
    with pytest.raises(DataError, match="amount 7"):
        again.scores(7)


def test_interrupted_work_is_resumed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stacked, "CHUNK", 2)
    method = further()
    whole = method.measure(task(), TRAIN, QUERIES, left_out=LEFT_OUT, folder=tmp_path)
    pieces = sorted(tmp_path.glob("seed-*.safetensors"))
    assert len(pieces) == 6  # five runs in three parts, two seeds
    pieces[1].unlink()
    stamps = {path: path.stat().st_mtime_ns for path in pieces if path.exists()}
    again = method.measure(task(), TRAIN, QUERIES, left_out=LEFT_OUT, folder=tmp_path)
    assert torch.equal(again.outcomes, whole.outcomes)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    more = further(seeds=3).measure(task(), TRAIN, QUERIES, left_out=LEFT_OUT, folder=tmp_path)
    assert torch.equal(more.outcomes[:2], whole.outcomes)
    with pytest.raises(MismatchError, match="learning_rate differs"):
        further(learning_rate=0.2).measure(
            task(), TRAIN, QUERIES, left_out=LEFT_OUT, folder=tmp_path
        )
    other = mlp()
    other[0].bias.data += 1
    with pytest.raises(MismatchError, match="model differs"):
        method.measure(task(other), TRAIN, QUERIES, left_out=LEFT_OUT, folder=tmp_path)
    with pytest.raises(MismatchError, match="groups differs"):
        method.measure(task(), TRAIN, QUERIES, left_out=[1, 2, 3], folder=tmp_path)
    assert json.loads((tmp_path / "work.json").read_text())["scheme"] == "every"


def test_tiny_effects_in_single_precision_are_reported() -> None:
    single = fb.Task(mlp(dtype=torch.float32), losses.cross_entropy)
    train = (TRAIN[0].float(), TRAIN[1])
    queries = (QUERIES[0].float(), QUERIES[1])
    method = further(double=False, learning_rate=1e-5, seeds=1)
    with pytest.warns(NumericalWarning, match=r"of 48 gold values are below 10 units"):
        method.measure(single, train, queries, left_out=LEFT_OUT)
    precise = further(learning_rate=1e-5, seeds=1).measure(
        single, train, queries, left_out=LEFT_OUT
    )
    assert precise.outcomes.dtype == torch.float64
    assert next(single.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "left_out", "error", "message"),
    [
        ({}, [1, 99], DataError, "99, which is no id"),
        ({}, [1, -1], DataError, "-1, which is no id"),
        ({}, [1, 1], DataError, "more than once"),
        ({}, [[1, 1]], DataError, "more than once"),
        ({}, [], DataError, "left_out is empty"),
        ({}, [[]], DataError, "empty group"),
        ({}, [list(range(N))], DataError, "nothing is left"),
        ({"adjustment": "mean"}, [1, 2], DataError, "at least 3"),
        ({"scheme": "mask", "batch_size": 1}, [1, 2], DataError, "empty without the group"),
        ({"learning_rate": 1e308}, LEFT_OUT, NonFiniteError, r"on everything, seed 0, step \d"),
    ],
)
def test_bad_requests_are_refused(options, left_out, error, message) -> None:
    with pytest.raises(error, match=message):
        further(**options).measure(task(), TRAIN, QUERIES, left_out=left_out)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": 0}, TaskError, "seeds is 0"),
        ({"amounts": ()}, TaskError, "rising"),
        ({"amounts": (2, 1)}, TaskError, "rising"),
        ({"amounts": (0, 1)}, TaskError, "above 0"),
        ({"fraction": 2.0}, TaskError, "at most all"),
        ({"fraction": 0.0}, TaskError, "fraction is 0"),
        ({"learning_rate": 0.0}, TaskError, "learning_rate is 0"),
        ({"clip": 0.0}, TaskError, "clip is 0"),
        ({"max_seeds": 1}, TaskError, "max_seeds is 1"),
        ({"reliability": 1.0}, TaskError, "between 0 and 1"),
        ({"scheme": "evry"}, UnknownNameError, "did you mean 'every'"),
        ({"optimizer": "adan"}, UnknownNameError, "did you mean 'adam'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        further(**options)


def test_bad_data_and_losses_are_refused() -> None:
    method = further()
    with pytest.raises(TaskError, match="deletes whole examples"):
        further(scheme="shift", fraction=0.5).measure(task(), TRAIN, QUERIES)
    with pytest.raises(DataError, match="the dataset is empty"):
        method.measure(task(), TRAIN, (QUERIES[0][:0], QUERIES[1][:0]))
    mean = fb.Task(mlp(), lambda model, batch: losses.cross_entropy(model, batch).mean())
    with pytest.raises(TaskError, match="one value an example"):
        method.measure(mean, TRAIN, QUERIES)
    x = TRAIN[0].clone()
    x[4] = float("nan")
    with pytest.raises(NonFiniteError, match=r"ids 4"):
        method.measure(task(), (x, TRAIN[1]), QUERIES)
    with pytest.raises(NonFiniteError, match="query 2"):
        method.measure(
            task(),
            TRAIN,
            (QUERIES[0] + torch.tensor([[0.0], [0], [np.inf], [0]]), QUERIES[1]),
            left_out=[1],
        )
    with pytest.raises(TaskError, match="a bare model has no loss"):
        method.measure(mlp(), TRAIN, QUERIES)
    bare = method.measure(mlp(), TRAIN, QUERIES, left_out=[1], loss=losses.cross_entropy)
    assert bare.gold().shape == (3, Q, 1)


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    further(dropout="shared").measure(task(model), TRAIN, QUERIES, left_out=[1])
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
