"""Sums over a dataset are formed over fixed pieces, wherever those are worked out."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import cloudpickle
import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear import stream as streams
from forebear.data import Data
from forebear.executors import Work
from forebear.executors.base import temporary_folder
from forebear.plan import make_plan
from forebear.projections import KeptStream
from forebear.stream import BATCH, PIECE, Stream, piecewise, stretches, summed

N = 23


@dataclass(frozen=True)
class Parcels:
    """Work that was pickled, the last piece first."""

    sizes: list[int] = field(default_factory=list)
    leads = True

    def run(self, work: Work) -> None:
        self.sizes.append(len(work))
        sent = cloudpickle.dumps(work)
        for piece in reversed(range(len(work))):
            cloudpickle.loads(sent).do(piece)

    def scratch(self) -> AbstractContextManager[Path]:
        return temporary_folder()


def stream(executor: Parcels | None = None) -> Stream:
    torch.manual_seed(0)
    task = fb.Task(nn.Linear(3, 2).double(), loss=fb.losses.cross_entropy)
    data = Data((torch.randn(N, 3).double(), torch.arange(N) % 2))
    return Stream(task, make_plan(task, data), data, 4, executor)


def losses(part: Stream, piece: int) -> dict[str, Tensor]:
    found = [values for _, values, _ in part.gradients(part.task.losses, "losses")]
    return {"sum": torch.cat(found).sum(), "numbers": torch.tensor([1, piece])}


def test_pieces_cover_a_dataset_and_consist_of_whole_batches() -> None:
    assert PIECE % BATCH == 0
    assert stretches(PIECE) == [slice(0, PIECE)]
    assert stretches(2 * PIECE + 1)[1:] == [
        slice(PIECE, 2 * PIECE),
        slice(2 * PIECE, 2 * PIECE + 1),
    ]


@pytest.mark.parametrize("together", [2, 32])
def test_a_sum_is_the_same_wherever_its_pieces_are_worked_out(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "PIECE", 8)
    monkeypatch.setattr(streams, "TOGETHER", together)
    executor, whole = Parcels(), stream()
    here, there = (summed(each, losses, "losses") for each in (whole, stream(executor)))
    every = whole.task.losses(whole.task.model, whole.data.batch(slice(0, N))).sum()
    assert torch.allclose(here["sum"], every, rtol=1e-12)
    assert here["numbers"].tolist() == [3, 0 + 1 + 2]
    assert torch.equal(here["sum"], there["sum"])
    assert torch.equal(here["numbers"], there["numbers"])
    assert executor.sizes == ([2, 1] if together == 2 else [3])


def test_features_in_memory_are_added_up_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PIECE", 8)
    one, features = stream(), torch.randn(N, 5)
    kept = KeptStream(one.task, one.data, one.plan, features, torch.arange(N))
    found = [(where, part["w"]) for where, part in piecewise(kept, weights, "features")]
    assert [where for where, _ in found] == [slice(0, 8), slice(8, 16), slice(16, N)]
    assert torch.equal(torch.cat([part for _, part in found]), torch.arange(N))
    some = kept.select(one.data.select(torch.tensor([4, 20])), torch.tensor([4, 20]))
    assert torch.equal(some.features, features[[4, 20]])
    assert some.data.ids.tolist() == some.weights.tolist() == [4, 20]


def weights(part: KeptStream, piece: int) -> dict[str, Tensor]:
    return {"w": part.weights}


def test_a_stream_without_parts_is_one_piece() -> None:
    class Whole:
        data = range(5)

    assert list(piecewise(Whole(), lambda part, piece: {}, "nothing")) == [(slice(0, 5), {})]
