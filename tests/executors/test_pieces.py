"""Work in numbered pieces, and folders that keep their results."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from forebear.errors import FormatError, MismatchError
from forebear.executors import InProcess, Pieces, results
from forebear.executors.pieces import KeptWork

NAMES = ("first", "second", "third")


class Counting:
    """Remembers which pieces were computed."""

    def __init__(self) -> None:
        self.computed: list[int] = []

    def __call__(self, piece: int) -> dict[str, Tensor]:
        self.computed.append(piece)
        return {"outcomes": torch.full((2,), float(piece))}


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path / "work", {"seed": 0})
    pieces.write("second", {"outcomes": torch.tensor([7.0, 7.0])})
    compute = Counting()
    found = list(results(compute, NAMES, "pieces", pieces=pieces))
    assert compute.computed == [0, 2]
    assert [result["outcomes"][0].item() for result in found] == [0.0, 7.0, 2.0]
    assert list(results(compute, NAMES, "pieces", pieces=pieces))
    assert compute.computed == [0, 2]


def test_without_a_folder_nothing_is_kept() -> None:
    compute = Counting()
    assert len(list(results(compute, NAMES, "pieces"))) == 3
    assert len(list(results(compute, NAMES, "pieces"))) == 3
    assert compute.computed == [0, 1, 2, 0, 1, 2]


def test_an_executor_in_process_does_what_is_missing(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path)
    pieces.write("first", {"outcomes": torch.zeros(2)})
    compute = Counting()
    work = KeptWork(compute, NAMES, "pieces", pieces)
    InProcess().run(work)
    assert compute.computed == [1, 2]
    assert all(work.done(piece) for piece in range(len(work)))


def test_a_folder_belongs_to_one_work(tmp_path: Path) -> None:
    Pieces(tmp_path, {"seed": 0, "epochs": (1, 2)})
    Pieces(tmp_path, {"seed": 0, "epochs": (1, 2)})
    with pytest.raises(MismatchError, match="seed differs"):
        Pieces(tmp_path, {"seed": 1, "epochs": (1, 2)})


def test_a_damaged_piece_is_named(tmp_path: Path) -> None:
    (tmp_path / "first.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(FormatError, match=r"first\.safetensors is damaged: delete it"):
        list(results(Counting(), NAMES, "pieces", pieces=Pieces(tmp_path)))


def test_a_piece_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    pieces = Pieces(tmp_path)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        pieces.write("first", {"outcomes": torch.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["work.json"]
