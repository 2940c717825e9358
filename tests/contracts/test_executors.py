"""What every executor keeps: one suite, run for each place that a single program can work at."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import forebear as fb
from forebear.errors import DataError, ForebearWarning
from forebear.executors import Executor, Pieces, Work, results

EXECUTORS = {
    "in-process": fb.InProcess(),
    "processes": fb.Processes(workers=2),
    "ray": fb.Ray(workers=2),
}


@pytest.fixture(params=EXECUTORS)
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "ray":
        pytest.importorskip("ray")
    return EXECUTORS[request.param]


@dataclass(frozen=True)
class Marks:
    """Pieces that leave a line in a common file, and a marker."""

    folder: Path
    size: int = 7
    refused: frozenset[int] = frozenset()
    description: str = "marks"

    def __len__(self) -> int:
        return self.size

    def done(self, piece: int) -> bool:
        return (self.folder / str(piece)).exists()

    def do(self, piece: int) -> None:
        if piece in self.refused:
            error = DataError(f"piece {piece} is refused")
            error.add_note("a note of its own")
            raise error
        with open(self.folder / "lines", "a") as file:
            file.write(f"{piece}\n")
        (self.folder / str(piece)).touch()

    @property
    def lines(self) -> list[int]:
        path = self.folder / "lines"
        return sorted(map(int, path.read_text().split())) if path.exists() else []


def test_every_piece_is_done_once(executor: Executor, tmp_path: Path) -> None:
    work: Work = Marks(tmp_path)
    executor.run(work)
    assert Marks(tmp_path).lines == list(range(7))
    executor.run(work)
    assert Marks(tmp_path).lines == list(range(7))


def test_what_is_done_is_not_done_again(executor: Executor, tmp_path: Path) -> None:
    for piece in (0, 3, 6):
        (tmp_path / str(piece)).touch()
    executor.run(Marks(tmp_path))
    assert Marks(tmp_path).lines == [1, 2, 4, 5]


def test_nothing_to_do_is_no_error(executor: Executor, tmp_path: Path) -> None:
    executor.run(Marks(tmp_path, size=0))


def test_an_exception_comes_out_as_it_was_raised_and_the_rest_can_be_done_later(
    executor: Executor, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="piece 2 is refused") as caught:
        executor.run(Marks(tmp_path, refused=frozenset([2])))
    assert str(caught.value) == "piece 2 is refused"
    assert caught.value.__notes__[0] == "a note of its own"
    assert 2 not in Marks(tmp_path).lines
    executor.run(Marks(tmp_path))
    lines = Marks(tmp_path).lines
    assert sorted(set(lines)) == list(range(7))
    # A piece that another worker was at when all were stopped is done again.
    assert len(lines) <= 7 + (0 if isinstance(executor, fb.InProcess) else 1)


def test_results_are_in_order_and_kept(executor: Executor, tmp_path: Path) -> None:
    shift = torch.randn(3)
    names = [f"part-{i}" for i in range(5)]
    found = results(
        lambda i: {"x": shift + i, "where": torch.tensor(os.getpid())},
        names,
        "parts",
        pieces=Pieces(tmp_path / "kept", {"seed": 0}),
        executor=executor,
    )
    for i, result in enumerate(found):
        assert torch.equal(result["x"], shift + i)
        elsewhere = not isinstance(executor, fb.InProcess)
        assert (int(result["where"]) != os.getpid()) == elsewhere
    again = results(
        None,  # type: ignore[arg-type]  # it is not called
        names,
        "parts",
        pieces=Pieces(tmp_path / "kept", {"seed": 0}),
        executor=executor,
    )
    assert torch.equal(list(again)[4]["x"], shift + 4)


def test_without_a_folder_results_are_gone_afterwards(executor: Executor) -> None:
    found = list(results(lambda i: {"x": torch.ones(i)}, ["a", "b"], "parts", executor=executor))
    assert [len(result["x"]) for result in found] == [0, 1]
    with executor.scratch() as folder:
        assert list(folder.iterdir()) == []
    assert not folder.exists()


def warned(piece: int) -> dict[str, torch.Tensor]:
    warnings.warn("the same from every piece", ForebearWarning, stacklevel=1)
    return {}


def test_a_warning_is_raised_here_once(executor: Executor) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        list(results(warned, ["a", "b", "c"], "parts", executor=executor))
    own: list[Any] = [w for w in caught if issubclass(w.category, ForebearWarning)]
    assert [str(w.message) for w in own] == ["the same from every piece"]
