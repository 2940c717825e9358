"""A model sharded over two processes gives the numbers of the whole model in one."""

from pathlib import Path

import pytest
import sharded_program
import torch
from safetensors.torch import load_file
from torch import Tensor

Found = dict[str, Tensor]

SCORES = [f"mlp {name}" for name in sharded_program.METHODS]
LANGUAGE = ["gpt graddot", "gpt ekfac", "gpt trak", "gpt rows"]


@pytest.fixture(scope="module")
def folder(launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("sharded")
    done = launch("sharded_program.py", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What one process finds with the whole models; the program shards the same ones."""
    patch = pytest.MonkeyPatch()
    patch.setattr("forebear.stream.PIECE", 0)  # found() sets it; it comes back at the end
    found = sharded_program.found(tmp_path_factory.mktemp("whole"), False, None)
    patch.undo()
    return found


@pytest.mark.parametrize("way", ["spread-0", "spread-1", "alike-0.rows", "alike-1.rows"])
@pytest.mark.parametrize("name", [*SCORES, "mlp top", "mlp self", "mlp rows", *LANGUAGE])
def test_numbers_are_those_of_the_whole_model(
    folder: Path, whole: Found, name: str, way: str
) -> None:
    """With examples shared out among the processes, and with all of them doing the same."""
    got = load_file(folder / way)[name]
    torch.testing.assert_close(got, whole[name], rtol=1e-5, atol=1e-6 * whole[name].abs().max())


@pytest.mark.parametrize("rank", [0, 1])
def test_hashes_are_those_of_the_whole_weights(folder: Path, whole: Found, rank: int) -> None:
    assert torch.equal(load_file(folder / f"spread-{rank}")["hashes"], whole["hashes"])


@pytest.mark.parametrize("rank", [0, 1])
def test_parameters_are_trainable_afterwards(folder: Path, rank: int) -> None:
    assert load_file(folder / f"spread-{rank}")["trainable"].all()
    assert (folder / f"errors-{rank}").read_text().splitlines()[-1] == "True"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_holds_half_of_the_parameters_and_a_layer_or_two(folder: Path, rank: int) -> None:
    whole, held, most = load_file(folder / f"memory-{rank}")["sizes"].tolist()
    assert held == pytest.approx(whole / 2, rel=0.02)
    # Of 16 equal layers: half of each, and the other half of the one at work and the next.
    assert held + 0.4 * whole / 16 < most < held + 1.1 * whole / 16


@pytest.mark.parametrize("rank", [0, 1])
def test_what_cannot_be_sharded_is_refused(folder: Path, rank: int) -> None:
    fallback, dense, *_ = (folder / f"errors-{rank}").read_text().splitlines()
    assert fallback.startswith("TaskError: no layer rule sees scale,")
    assert "exclude it with layers=" in fallback
    assert dense.startswith("TaskError: the model is sharded over processes")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_example_of_one_process_is_named_in_all(folder: Path, rank: int) -> None:
    error = (folder / f"errors-{rank}").read_text().splitlines()[2]
    assert error.startswith("NonFiniteError:")
    assert "(ids 20)" in error
