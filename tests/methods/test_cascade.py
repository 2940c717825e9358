"""A cascade answers as the last stage would, were there only the candidates of the others."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.errors import DataError, MismatchError, TaskError
from forebear.methods.cascade import Cascade, FittedCascade, scores_of

LOSS = fb.losses.cross_entropy
N, Q = 60, 7


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


TRAIN, QUERIES = points(N, 1), points(Q, 2)
METHODS = {
    "random": fb.Random(),
    "similarity": fb.Similarity(metric="dot"),
    "graddot": fb.GradDot(),
    "gradcos": fb.GradCos(),
    "trak": fb.TRAK(dimension=24, damping=0.1),
    "ekfac": fb.EKFAC(rank=None, targets="exact"),
    "exact": fb.Exact(damping=0.5),
    "cg": fb.CG(damping=0.5, tolerance=1e-10),
    "datainf": fb.DataInf(),
    "arnoldi": fb.Arnoldi(damping=0.5),
    "relatif": fb.RelatIF(curvature="gauss_newton", damping=5.0),
    "newton_step": fb.NewtonStep(damping=0.3),
}


def task() -> fb.Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    return fb.Task(model, LOSS)


def by_hand(
    matrices: list[np.ndarray], keep: list[int], lowest: list[bool]
) -> tuple[list[np.ndarray], np.ndarray]:
    """What each stage keeps, by sorting whole matrices in which the dropped ones stand last."""
    signs = [1.0 if low else -1.0 for low in lowest]
    kept = [np.argsort(signs[0] * matrices[0], axis=1, kind="stable")[:, : keep[0]]]
    for scores, number, sign in zip(matrices[1:], keep[1:], signs[1:], strict=True):
        masked = np.full_like(scores, np.inf)
        np.put_along_axis(masked, kept[-1], np.take_along_axis(sign * scores, kept[-1], 1), 1)
        kept.append(np.argsort(masked, axis=1, kind="stable")[:, :number])
    return kept, np.take_along_axis(matrices[-1], kept[-1], 1)


@pytest.mark.parametrize("name", METHODS)
def test_scores_of_some_examples_are_those_of_all(name: str) -> None:
    fitted = METHODS[name].fit(task(), TRAIN, batch_size=16)
    positions = np.array([2, 3, 19, 20, 41, 59])
    queries = fb.Data(QUERIES)
    found = torch.full((Q, len(positions)), torch.nan, dtype=torch.float64)
    for rows, columns, values in scores_of(fitted, queries, positions):
        found[rows, columns] = values.double()
    expected = fitted.score(QUERIES).values[:, positions].double()
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("together", [1, 3, 100])
@pytest.mark.parametrize(
    "names", [("similarity", "trak", "ekfac"), ("random", "graddot", "newton_step")]
)
def test_each_stage_orders_what_the_one_before_it_kept(
    names: tuple[str, ...], together: int, opponents: bool
) -> None:
    methods = [METHODS[name] for name in names]
    matrices = [m.fit(task(), TRAIN).score(QUERIES).values.double().numpy() for m in methods]
    fitted = Cascade(methods, keep=[25, 9], together=together).fit(task(), TRAIN, batch_size=16)
    found = fitted.top(QUERIES, k=4, opponents=opponents)
    # What looks alike to the model is kept for opponents too.
    lowest = [opponents and name != "similarity" for name in names]
    kept, values = by_hand(matrices, [25, 9, 4], lowest)
    assert (found.ids == kept[-1]).all()
    assert np.allclose(found.values.numpy(), values, rtol=1e-7, atol=1e-12)
    recall = fitted.recall(QUERIES, k=4, opponents=opponents)
    full = np.argsort((1 if opponents else -1) * matrices[-1], axis=1, kind="stable")[:, :4]
    for after, left in zip(recall.after, kept[:-1], strict=True):
        shares = [np.isin(mine, some).mean() for mine, some in zip(full, left, strict=True)]
        assert after.tolist() == shares
    assert recall.mean == pytest.approx(recall.after[-1].mean().item())
    assert recall.mean < 1
    assert f"least {recall.after[-1].min():.1%}" in str(recall)


def test_a_cascade_that_drops_nothing_gives_the_last_stages_answer() -> None:
    fitted = Cascade([METHODS["random"], METHODS["ekfac"]], keep=[10_000]).fit(task(), TRAIN)
    alone = METHODS["ekfac"].fit(task(), TRAIN)
    assert (fitted.top(QUERIES, k=N).ids == alone.top(QUERIES, k=N).ids).all()
    assert fitted.recall(QUERIES, k=5).mean == 1.0
    assert torch.equal(fitted.self_influence(), alone.self_influence())


class Counted:
    """A dataset of examples that counts how often one is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        return TRAIN[0][i], TRAIN[1][i]


def test_the_last_stage_reads_only_candidates() -> None:
    data, ids = Counted(), [f"row-{i}" for i in range(N)]
    methods = [METHODS["similarity"], METHODS["ekfac"]]
    fitted = Cascade(methods, keep=[3]).fit(task(), data, ids=ids)
    query = (QUERIES[0][:2], QUERIES[1][:2])
    _ = fitted.top(query, k=1)  # hashes the training set once
    data.reads = 0
    found = fitted.top(query, k=3, ids=["a", "b"])
    assert 3 <= data.reads <= 6
    same = Cascade(methods, keep=[3]).fit(task(), TRAIN).top(query, k=3)
    assert found.ids.tolist() == [[f"row-{i}" for i in row] for row in same.ids]
    assert found.query_ids.tolist() == ["a", "b"]


def test_the_answer_says_where_it_comes_from() -> None:
    methods = [METHODS["similarity"], METHODS["ekfac"]]
    about = Cascade(methods, keep=[20]).fit(task(), TRAIN).top(QUERIES, k=3).provenance
    assert about.method == "cascade"
    assert about.units == "removal"
    assert about.coverage == 1.0
    assert about.settings["keep"] == [20]
    assert [stage["name"] for stage in about.settings["stages"]] == ["similarity", "ekfac"]
    assert about.settings["stages"][1]["damping_used"]


def test_stages_that_were_fitted_apart_make_a_cascade() -> None:
    stages = [METHODS[name].fit(task(), TRAIN) for name in ("similarity", "ekfac")]
    together = Cascade([METHODS["similarity"], METHODS["ekfac"]], keep=[20]).fit(task(), TRAIN)
    found = FittedCascade(stages, [20]).top(QUERIES, k=5)
    assert (found.ids == together.top(QUERIES, k=5).ids).all()
    with pytest.raises(MismatchError, match="train differs"):
        FittedCascade([stages[0], METHODS["ekfac"].fit(task(), points(N, 9))], [20])
    renamed = METHODS["ekfac"].fit(task(), TRAIN, ids=np.arange(N) + 1)
    with pytest.raises(DataError, match="other ids"):
        FittedCascade([stages[0], renamed], [20])


def test_bad_input_is_refused_by_name() -> None:
    methods = [METHODS["random"], METHODS["graddot"]]
    for stages, keep, message in [
        (methods[:1], [], "1 stages"),
        (methods, [5, 5], "2 numbers to keep"),
        (methods, [0], "at least 1"),
        ([*methods, METHODS["exact"]], [5, 6], "must not grow"),
    ]:
        with pytest.raises(TaskError, match=message):
            Cascade(stages, keep)
    with pytest.raises(TaskError, match="together is 0"):
        Cascade(methods, [5], together=0)
    fitted: Any = Cascade(methods, [5]).fit(task(), TRAIN)
    with pytest.raises(DataError, match="k is 6 and 5 candidates"):
        fitted.top(QUERIES, k=6)
    with pytest.raises(DataError, match=f"k is {N + 1} and there are {N}"):
        fitted.top(QUERIES, k=N + 1)
    with pytest.raises(TaskError, match=r"ask for top\(queries, k\)"):
        fitted.score(QUERIES)
