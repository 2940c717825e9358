"""Work shared by the processes of a torchrun program is what one process finds."""

from pathlib import Path

import pytest
import spread_program
import torch
from safetensors.torch import load_file
from torch import Tensor

import forebear as fb
from forebear.executors import Pieces
from forebear.executors.torchrun import Torchrun

Found = dict[str, Tensor]


@pytest.fixture(scope="module")
def shared(launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    done = launch("spread_program.py", "share", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(alone_in: Path) -> Found:
    patch = pytest.MonkeyPatch()
    for name in ("forebear.stream.PIECE", "forebear.training.truth.PIECE"):
        patch.setattr(name, 0)  # the program sets them; they come back at the end
    found = spread_program.found(alone_in, None)
    patch.undo()
    return found


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("name", ["outcomes", "rows", "scores", "top"])
def test_results_are_those_of_one_process(shared: Path, alone: Found, name: str, rank: str) -> None:
    assert torch.equal(load_file(shared / rank)[name], alone[name])


@pytest.mark.usefixtures("alone")
def test_shards_of_a_store_are_the_same_bytes(shared: Path, alone_in: Path) -> None:
    shards = sorted((alone_in / "store").glob("shard-*"))
    assert len(shards) == 7
    for shard in shards:
        assert shard.read_bytes() == (shared / "store" / shard.name).read_bytes()
    assert not list((shared / "store").glob("*.partial"))
    assert not (shared / "store" / "build.lock").exists()


def test_one_process_leads_and_all_get_every_result(shared: Path) -> None:
    first, second = load_file(shared / "0"), load_file(shared / "1")
    assert (bool(first["leads"]), bool(second["leads"])) == (True, False)
    squares = [number**2 for number in range(7)]
    assert first["squares"].tolist() == squares
    assert second["squares"].tolist() == squares


def test_an_exception_of_one_process_is_raised_in_all(shared: Path) -> None:
    # Piece 3 belongs to the second process, and the first learns of it.
    assert (shared / "error-1").read_text() == "piece 3 is refused []"
    error = (shared / "error-0").read_text()
    assert error == "piece 3 is refused ['raised in process 1 of 2']"
    kept = Pieces(shared / "refused")
    assert [kept.has(name) for name in spread_program.NAMES[:3]] == [True] * 3
    assert not kept.has("piece-3")
    assert load_file(shared / "0")["after"] == load_file(shared / "1")["after"] == 7


def test_a_killed_process_costs_the_pieces_it_had_not_done(launch, tmp_path: Path) -> None:
    killed = launch("spread_program.py", "die_once", tmp_path)
    assert killed.returncode != 0
    assert not (tmp_path / "end").exists()
    again = launch("spread_program.py", "die_once", tmp_path)
    assert again.returncode == 0, again.stderr
    end = load_file(tmp_path / "end")
    assert end["square"].tolist() == [n**2 for n in range(7)]
    lives = end["life"].tolist()
    assert lives[1] == 0  # what the killed process had done was not done again
    assert lives[3] == lives[5] == 1


def test_a_program_that_torchrun_did_not_start_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(fb.ForebearError, match="start it with `torchrun --nproc-per-node"):
        Torchrun().run(spread_program.NAMES)  # type: ignore[arg-type]
