"""Pieces of work shared by two processes: what `test_torchrun.py` starts and compares with."""

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import forebear as fb
from forebear.executors import Executor, Pieces, results
from forebear.methods.features import build_store
from forebear.training import GroundTruth, Recipe, half_subsets

N = 60
NAMES = tuple(f"piece-{number}" for number in range(7))


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).eval()


def recipe() -> Recipe:
    return Recipe(network, fb.losses.cross_entropy, learning_rate=0.3, epochs=2, batch_size=8)


def found(folder: Path, executor: Executor | None) -> dict[str, Tensor]:
    """What every process of the program, or this one alone, works out."""
    from forebear import stream
    from forebear.training import truth

    truth.PIECE, stream.PIECE = 4, 16
    train, queries = points(N, 0), points(7, 1)
    collected = GroundTruth.collect(
        recipe(), train, queries, subsets=half_subsets(N, 7), seeds=2, executor=executor
    )
    torch.manual_seed(0)
    task = fb.Task(network(), fb.losses.cross_entropy)
    store = build_store(
        fb.TRAK(dimension=8),
        task,
        train,
        folder / "store",
        dtype="float32",
        shard_rows=9,
        batch_size=4,
        executor=executor,
    )
    ekfac = fb.EKFAC().fit(task, train, batch_size=4, executor=executor)
    return {
        "outcomes": collected.outcomes,
        "rows": store.rows(torch.arange(N).numpy()),
        "scores": ekfac.score(queries).values,
        "top": ekfac.top(queries, k=3).values,
    }


def square(piece: int) -> dict[str, Tensor]:
    return {"square": torch.tensor([piece**2])}


def refused(piece: int) -> dict[str, Tensor]:
    if piece == 3:
        raise ValueError("piece 3 is refused")
    return square(piece)


def share(folder: Path) -> None:
    executor = fb.Torchrun()
    rank = os.environ["RANK"]
    tensors = found(folder, executor)
    squares = torch.cat([each["square"] for each in results(square, NAMES, "", executor=executor)])
    kept = Pieces(folder / "refused")
    try:
        list(results(refused, NAMES, "", pieces=kept, executor=executor))
        error = "none"
    except ValueError as raised:
        error = f"{raised} {getattr(raised, '__notes__', [])}"
    after = list(results(square, NAMES, "", executor=executor))  # the group still works
    (folder / f"error-{rank}").write_text(error)
    leads = torch.tensor(executor.leads)
    tensors |= {"squares": squares, "leads": leads, "after": torch.tensor(len(after))}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / rank)


def die_once(folder: Path) -> None:
    """The second process is killed in its second piece, in the first life of the program."""
    life = int((folder / "died").exists())

    def compute(piece: int) -> dict[str, Tensor]:
        if piece == 3 and not life:
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {**square(piece), "life": torch.tensor([life])}

    kept = Pieces(folder / "pieces", {"seed": 0})
    all_of = list(results(compute, NAMES, "", pieces=kept, executor=fb.Torchrun()))
    if fb.Torchrun().leads:
        ended = {name: torch.cat([each[name] for each in all_of]) for name in all_of[0]}
        save_file(ended, folder / "end")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"share": share, "die_once": die_once}[sys.argv[1]](Path(sys.argv[2]))
