"""Methods whose passes over the training set are made in other processes."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear import stream as streams
from forebear.curvature.sampled import generator_of
from forebear.executors import InProcess, Work
from forebear.executors.base import temporary_folder
from forebear.executors.processes import Processes
from forebear.methods.blocks import ScoreBlocks
from forebear.methods.fitted import Fitted

N, Q, PIECE, BATCH = 70, 5, 24, 8


@dataclass(frozen=True)
class Parcels:
    """Work that was pickled, the last piece first: another process without the time to start it."""

    leads = True

    def run(self, work: Work) -> None:
        sent = cloudpickle.dumps(work)
        for piece in reversed(range(len(work))):
            if not work.done(piece):
                cloudpickle.loads(sent).do(piece)

    def scratch(self) -> AbstractContextManager[Path]:
        return temporary_folder()


METHODS: dict[str, Any] = {
    "graddot": fb.GradDot(),
    "gradcos": fb.GradCos(),
    "relatif": fb.RelatIF(),
    "kfac": fb.KFAC(),
    "ekfac": fb.EKFAC(),
    "ekfac, several draws": fb.EKFAC(draws=3),
    "ekfac, all targets": fb.EKFAC(targets="exact"),
    "ekfac, labels": fb.EKFAC(targets="empirical"),
    "diagonal": fb.get("diagonal"),
    "dense Gauss-Newton": fb.Influence(curvature=fb.curvature.Dense(kind="gauss_newton")),
    "Hessian by layer": fb.Exact(blocks="layers"),
    "newton_step": fb.get("newton_step", damping=0.3),
    "conjugate gradients": fb.get("cg", damping=0.5),
    "correction": fb.Influence(curvature=fb.curvature.Kronecker(), correction="both"),
    "trak": fb.TRAK(dimension=16, damping=0.1),
    "similarity": fb.Similarity(),
    "random": fb.get("random"),
}


def task() -> fb.Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    return fb.Task(model, loss=fb.losses.cross_entropy)


def examples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


TRAIN, QUERIES = examples(N, 1), examples(Q, 2)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(streams, "PIECE", PIECE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fit(name: str, **options: Any) -> Fitted:
    return METHODS[name].fit(task(), TRAIN, batch_size=BATCH, **options)


@pytest.mark.parametrize("name", METHODS)
def test_pieces_worked_out_elsewhere_give_the_same_bits(name: str) -> None:
    here, there = fit(name), fit(name, executor=Parcels())
    assert there.executor == Parcels()
    kept = there.tensors()
    for key, value in here.tensors().items():
        assert torch.equal(value, kept[key]), key
    whole = here.score(QUERIES).values
    assert torch.equal(whole, there.score(QUERIES).values)
    assert torch.equal(here.self_influence(), there.self_influence())
    for opponents in (False, True):
        top = there.top(QUERIES, k=9, opponents=opponents)
        expected = here.top(QUERIES, k=9, opponents=opponents)
        assert (top.ids == expected.ids).all()
        assert torch.equal(top.values, expected.values)
    assert torch.equal(here.on(Parcels()).score(QUERIES).values, whole)


def test_two_processes_give_the_bits_of_this_one() -> None:
    elsewhere = Processes(workers=2, threads=1)
    here, there = fit("kfac"), fit("kfac", executor=elsewhere)
    for key, value in here.tensors().items():
        assert torch.equal(value, there.tensors()[key]), key
    top = there.top(QUERIES, k=4)
    assert (top.ids == here.top(QUERIES, k=4).ids).all()
    assert torch.equal(top.values, here.top(QUERIES, k=4).values)


def test_methods_that_retrain_do_so_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebear.methods.leave_one_out.MODELS", 4)
    train = (TRAIN[0][:10], TRAIN[1][:10])
    settings: dict[str, Any] = {"learning_rate": 0.1, "epochs": 2, "batch_size": 5}
    recipe = fb.Recipe(lambda: task().model, fb.losses.cross_entropy, **settings)
    for method in (fb.get("leave_one_out", recipe=recipe), fb.get("further_training", epochs=1)):
        here = method.fit(task(), train).score(QUERIES).values
        there = method.fit(task(), train, executor=Parcels()).score(QUERIES).values
        assert torch.allclose(here, there, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["ekfac, labels", "dense Gauss-Newton", "trak"])
def test_pieces_change_nothing_beyond_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = fit(name).score(QUERIES).values
    monkeypatch.setattr(streams, "PIECE", N)
    whole = fit(name).score(QUERIES).values
    assert torch.allclose(cut, whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())


def test_drawn_targets_belong_to_seed_and_piece() -> None:
    drawn = []
    for seed, piece in ((0, 0), (0, 0), (0, 1), (1, 0)):
        generator = generator_of(task(), seed, piece)
        drawn.append(torch.rand(8, generator=generator))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], torch.rand(8, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


def test_factors_that_were_not_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = fit("ekfac").tensors()
    monkeypatch.setattr("forebear.curvature.kronecker.KEPT_BYTES", 5000)  # less than one piece
    for key, value in fit("ekfac").tensors().items():
        assert torch.equal(value, kept[key]), key


def test_an_executor_in_process_is_no_other_place() -> None:
    fitted = fit("kfac", executor=InProcess())
    assert torch.equal(fitted.score(QUERIES).values, fit("kfac").score(QUERIES).values)


@pytest.mark.parametrize("name", ["ekfac", "trak", "newton_step", "similarity", "random"])
def test_restricted_scores_are_those_of_the_whole(name: str) -> None:
    fitted, positions = fit(name), torch.tensor([3, 4, 30, 69])
    part = fitted.restricted(positions)
    if name == "random":  # a pair's score follows from its place among all
        assert part is None
        return
    assert part is not None
    assert (part.train.ids == positions.numpy()).all()
    expected = fitted.score(QUERIES).values[:, positions]
    assert torch.allclose(part.score(QUERIES).values, expected, rtol=1e-4, atol=1e-7)


def test_a_query_without_a_finite_score_is_named() -> None:
    fitted = fit("graddot", executor=Parcels())
    huge = QUERIES[0].clone()
    huge[2] = 3e38
    with pytest.raises(fb.errors.NonFiniteError, match="c"):
        fitted.top((huge, QUERIES[1]), k=2, ids=list("abcde"))


@pytest.mark.parametrize("name", ["ekfac", "trak", "random"])
def test_blocks_on_disk_are_the_scores(name: str, tmp_path: Path) -> None:
    fitted = fit(name)
    scores = fitted.score(QUERIES, ids=list("abcde"))
    blocks = fitted.score_to(QUERIES, tmp_path / "scores", ids=list("abcde"))
    blocks = ScoreBlocks.open(blocks.folder)
    assert blocks.shape == (Q, N)
    assert blocks.provenance == scores.provenance
    assert torch.equal(blocks.rows(["d", "a"]), scores.values[[3, 0]])
    for opponents in (False, True):
        assert (
            blocks.top(7, opponents=opponents).ids == scores.top(7, opponents=opponents).ids
        ).all()
    matrix = blocks.to_npy(tmp_path / "scores.npy")
    assert (np.load(tmp_path / "scores.npy", mmap_mode="r") == scores.values.numpy()).all()
    assert isinstance(matrix, np.memmap)
    median = scores.values.sort(1).values[:, (N + 1) // 2 - 1]
    assert torch.allclose(blocks.quantiles().at(0.5), median, rtol=0.008)
    with pytest.raises(fb.errors.DataError, match="no scores of query 'z'"):
        blocks.rows(["z"])


@pytest.mark.parametrize("executor", [None, Parcels()])
def test_blocks_that_are_there_are_not_scored_again(executor: Any, tmp_path: Path) -> None:
    fitted = fit("ekfac").on(executor)
    expected = fitted.score(QUERIES).values
    fitted.score_to(QUERIES, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3  # stretches of 24, 24 and 22 examples
    before = {file.name: file.stat().st_mtime_ns for file in files}
    (tmp_path / "blocks.json").unlink()
    files[1].unlink()
    with pytest.raises(fb.errors.FormatError, match="stopped halfway"):
        ScoreBlocks.open(tmp_path)
    blocks = fitted.score_to(QUERIES, tmp_path)
    after = {file.name: file.stat().st_mtime_ns for file in files}
    assert [name for name in before if before[name] != after[name]] == [files[1].name]
    assert torch.equal(blocks.rows(range(Q)), expected)
    with pytest.raises(fb.errors.MismatchError, match="settings differs"):
        fit("kfac").score_to(QUERIES, tmp_path)
    files[0].write_bytes(b"nothing")
    with pytest.raises(fb.errors.FormatError, match="damaged: delete it"):
        list(blocks.blocks())
