"""What every registered method keeps: one suite, run for each row of the name table.

Methods for diffusion models have a suite of their own.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import forebear as fb
from forebear.methods import METHODS as REGISTERED

METHODS = [name for name, row in REGISTERED.items() if "diffusion models" not in row.modalities]
N, Q = 50, 6
OPTIONS: dict[str, dict[str, Any]] = {
    "trak": {"dimension": 32, "damping": 0.1},
    "newton_step": {"damping": 0.3},
    "arnoldi": {"damping": 0.5},
    "nystrom": {"damping": 0.5},
    "relatif": {"curvature": "gauss_newton", "damping": 5.0},
    "cg": {"damping": 0.5, "tolerance": 1e-10},
    "ekfac_cg": {"damping": 0.5, "tolerance": 1e-10},
    "lissa": {"damping": 0.5, "tolerance": 1e-10, "depth": 20_000},
    # Whole batches, so that the order of the training examples plays no part.
    "further_training": {"learning_rate": 0.2, "epochs": 20, "batch_size": N, "seeds": 1},
    "unrolled": {"learning_rate": 0.2, "epochs": 20, "batch_size": N},
    "nda": {"patch": 1, "shape": (1, 2, 2)},  # rows of four features as the pixels of an image
}
GRADIENT = [name for name in METHODS if name not in ("random", "similarity", "pixels", "nda")]
LOSS = fb.losses.cross_entropy


def get(name: str) -> Any:
    return fb.get(name, **OPTIONS.get(name, {}))


def untrained() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


OPTIONS["leave_one_out"] = {
    "recipe": fb.Recipe(
        untrained, LOSS, learning_rate=0.2, weight_decay=1e-3, epochs=60, batch_size=N
    )
}


def two_gaussians(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64) + 2.0 * y[:, None] - 1.0
    return x, y


def trained(train: tuple[Tensor, Tensor]) -> nn.Module:
    model = untrained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, weight_decay=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        LOSS(model, train).mean().backward()
        optimizer.step()
    return model.eval()


TRAIN, QUERIES = two_gaussians(N, 1), two_gaussians(Q, 2)
MODEL = trained(TRAIN)


@pytest.mark.parametrize("name", METHODS)
def test_batch_size_and_order_of_queries_change_no_score(name: str) -> None:
    task = fb.Task(MODEL, LOSS)
    whole = get(name).fit(task, TRAIN).score(QUERIES).values
    if name in ("kfac", "ekfac", "diagonal"):  # targets are drawn batch by batch
        whole = get_deterministic(name).fit(task, TRAIN).score(QUERIES).values
    small = get_deterministic(name).fit(task, TRAIN, batch_size=7).score(QUERIES).values
    assert torch.allclose(whole, small, rtol=1e-6, atol=1e-9)
    if name == "random":
        return
    backwards = (QUERIES[0].flip(0), QUERIES[1].flip(0))
    turned = get_deterministic(name).fit(task, TRAIN).score(backwards).values.flip(0)
    assert torch.allclose(whole, turned, rtol=1e-6, atol=1e-9)


def get_deterministic(name: str) -> Any:
    return fb.get(name, targets="empirical") if name in ("kfac", "ekfac", "diagonal") else get(name)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_training_examples_only_permutes_scores(name: str) -> None:
    if name == "random":
        pytest.skip("scores belong to positions")
    task = fb.Task(MODEL, LOSS)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    scores = get_deterministic(name).fit(task, TRAIN).score(QUERIES).values
    shuffled = (TRAIN[0][order], TRAIN[1][order])
    permuted = get_deterministic(name).fit(task, shuffled).score(QUERIES).values
    assert torch.allclose(scores[:, order], permuted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_streamed_top_is_the_sorted_matrix(name: str, opponents: bool) -> None:
    fitted = get(name).fit(fb.Task(MODEL, LOSS), TRAIN, batch_size=8)
    scores = fitted.score(QUERIES)
    for k in (1, 5, N):
        streamed = fitted.top(QUERIES, k=k, opponents=opponents)
        order = np.argsort((1 if opponents else -1) * scores.values.numpy(), 1, kind="stable")
        assert (streamed.ids == order[:, :k]).all()
        assert (scores.top(k, opponents=opponents).ids == order[:, :k]).all()
        assert torch.equal(streamed.values, scores.top(k, opponents=opponents).values)


def test_ties_fall_to_the_earlier_example() -> None:
    twice = (torch.cat([TRAIN[0], TRAIN[0]]), torch.cat([TRAIN[1], TRAIN[1]]))
    fitted = fb.GradDot().fit(fb.Task(MODEL, LOSS), twice, batch_size=30)
    assert (fitted.top(QUERIES, k=9).ids == fitted.score(QUERIES).top(9).ids).all()


@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_it_gives_the_same_scores(name: str, tmp_path: Path) -> None:
    task = fb.Task(MODEL, LOSS)
    fitted = get(name).fit(task, TRAIN)
    fitted.save(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = fb.load(tmp_path, task, TRAIN)
    assert torch.allclose(loaded.score(QUERIES).values, fitted.score(QUERIES).values, rtol=1e-6)
    assert torch.allclose(loaded.self_influence(), fitted.self_influence(), rtol=1e-6)
    other = fb.Task(trained(two_gaussians(N, 9)), LOSS)
    with pytest.raises(fb.errors.MismatchError, match="fitted to model"):
        fb.load(tmp_path, other, TRAIN)
    with pytest.raises(fb.errors.MismatchError, match="training set"):
        fb.load(tmp_path, task, two_gaussians(N, 9))
    with pytest.raises(fb.errors.DataError, match="pass train="):
        fb.load(tmp_path, task)


@pytest.mark.parametrize("name", METHODS)
def test_scores_state_what_they_are(name: str, tmp_path: Path) -> None:
    ids = [f"row-{i}" for i in range(N)]
    fitted = get(name).fit(fb.Task(MODEL, LOSS), TRAIN, ids=ids)
    scores = fitted.score(QUERIES, ids=list("abcdef"))
    about = scores.provenance
    assert scores.values.shape == (Q, N)
    assert about.method == name
    assert about.units in ("removal", "ranking")
    assert about.model == fb.Task(MODEL, LOSS).model_hash()
    assert scores.top(3).ids[0, 0] in ids
    assert fitted.self_influence().shape == (N,)
    scores.save(tmp_path)
    again = fb.Scores.load(tmp_path)
    assert torch.equal(again.values, scores.values)
    assert again.provenance == about
    assert (again.train_ids == scores.train_ids).all()


def change_after_a_step(examples: list[int], query: tuple[Tensor, Tensor]) -> float:
    """What one small training step on some examples does to the query's measurement."""
    model = fb.Task(MODEL, LOSS).copy_model()
    some = (TRAIN[0][examples], TRAIN[1][examples])
    grads = torch.autograd.grad(LOSS(model, some).mean(), list(model.parameters()))
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter -= 1e-4 * grad
    return LOSS(MODEL, query).item() - LOSS(model, query).item()


@pytest.mark.parametrize("name", GRADIENT)
def test_a_step_on_a_proponent_raises_the_measurement(name: str) -> None:
    """The sign, by experiment: a step on an example changes the query as its score says.

    A step follows the plain gradient, so it decides every pair for first-order methods; those
    with a curvature foresee training to the end, and must agree with single steps in rank.
    """
    scores = get(name).fit(fb.Task(MODEL, LOSS), TRAIN).score(QUERIES).values
    agreement = []
    for q in range(Q):
        query = (QUERIES[0][q : q + 1], QUERIES[1][q : q + 1])
        changes = torch.tensor([change_after_a_step([i], query) for i in range(N)])
        agreement.append(spearmanr(scores[q], changes).statistic)
        if name in ("graddot", "gradcos", "tracin"):
            assert (changes * scores[q] > 0).all()
    assert np.mean(agreement) > 0.15, agreement


@pytest.mark.parametrize("name", GRADIENT)
def test_a_mislabelled_example_is_an_opponent_and_stands_out(name: str) -> None:
    x, y = two_gaussians(N, 1)
    x[3], y[3] = torch.full((4,), -2.0).double(), 1
    model = trained((x, y))
    fitted = get(name).fit(fb.Task(model, LOSS), (x, y))
    query = (torch.full((1, 4), -1.5).double(), torch.tensor([0]))
    scores = fitted.score(query).values[0]
    assert scores[3] < scores.median()
    if name != "gradcos":  # a cosine with itself is one for all
        own = fitted.self_influence()
        assert own[3] >= own.sort().values[-5]


@pytest.mark.parametrize("name", METHODS)
def test_bad_input_is_refused_by_name(name: str) -> None:
    task, method = fb.Task(MODEL, LOSS), get(name)
    with pytest.raises(fb.errors.DataError, match="the dataset is empty"):
        method.fit(task, (TRAIN[0][:0], TRAIN[1][:0]))
    with pytest.raises(fb.errors.DataError, match="'a' stands 2 times"):
        method.fit(task, TRAIN, ids=["a", *map(str, range(N - 2)), "a"])
    fitted = method.fit(task, TRAIN)
    with pytest.raises(fb.errors.DataError, match=r"shape \(3,\), the training"):
        fitted.score((torch.randn(2, 3).double(), torch.zeros(2, dtype=torch.long)))
    with pytest.raises(fb.errors.DataError, match=f"k is {N + 1} and there are {N}"):
        fitted.top(QUERIES, k=N + 1)
    with pytest.raises(fb.errors.UnknownNameError, match="unknown option"):
        fb.get(name, no_such_option=1)


@pytest.mark.parametrize("name", GRADIENT)
def test_a_loss_of_the_wrong_shape_or_nan_is_refused(name: str) -> None:
    class Mean(fb.losses.CrossEntropy):
        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return super().loss(outputs, batch).mean()

    with pytest.raises(fb.errors.TaskError, match="one value an example"):
        get(name).fit(fb.Task(MODEL, Mean()), TRAIN).score(QUERIES)
    x = TRAIN[0].clone()
    x[17] = float("nan")
    ids = [str(i) if i != 17 else "seventeen" for i in range(N)]
    with pytest.raises(fb.errors.NonFiniteError, match="seventeen"):
        get(name).fit(fb.Task(MODEL, LOSS), (x, TRAIN[1]), ids=ids).score(QUERIES)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_in_training_mode_is_scored_in_evaluation_mode(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    quiet = get(name).fit(fb.Task(model.eval(), LOSS), TRAIN).score(QUERIES).values
    model.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = get(name).fit(fb.Task(model, LOSS), TRAIN).score(QUERIES).values
    if name not in ("random", "pixels", "nda"):
        assert any(w.category is fb.errors.EvaluationModeWarning for w in caught)
    assert torch.allclose(scores, quiet)
    assert model.training


def test_an_unknown_method_comes_with_the_nearest_name() -> None:
    with pytest.raises(fb.errors.UnknownNameError, match="did you mean 'ekfac'"):
        fb.get("ekfak")
    with pytest.raises(fb.errors.UnknownNameError, match="did you mean 'damping'"):
        fb.get("ekfac", dampin=0.1)


def test_methods_is_a_table_to_read_and_to_call() -> None:
    rows = fb.methods()
    assert [row["name"] for row in rows] == list(REGISTERED)
    assert all(row[key] for row in rows for key in ("family", "needs", "cost", "paper", "label"))
    assert fb.attribute(fb.Task(MODEL, LOSS), TRAIN, QUERIES, method="graddot").values.shape
