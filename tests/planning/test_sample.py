"""Samples in real processes: a small task from the file to the prediction, and what goes wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from forebear.errors import ForebearError
from forebear.planning import Limits, plan_file
from forebear.planning.child import Request
from forebear.planning.sample import take

TASK = """
import torch
from torch import nn
import forebear as fb

print("a line that must not come between the facts")


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 300, generator=generator)
    return x, (x[:, 0] > 0).long()


def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 2))
    return fb.Task(model, loss=fb.losses.cross_entropy)


def train():
    return rows(8000, 1)


def queries():
    return rows(40, 2)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "small.py"
    path.write_text(TASK)
    return path


def test_the_command_of_an_offer_leaves_as_many_bytes_as_were_predicted(file: Path) -> None:
    """How near times come depends on the machine: `benchmarks/planning.py` measures it."""
    # Much time, so that a busy machine gets to a quarter of the data; an idle one is there at once.
    (offer,) = plan_file(file, Limits(seconds=600, memory=8e9, disk=1e12), method="graddot").offers
    assert offer.prediction is not None
    assert offer.prediction.sampled <= 2000
    assert offer.prediction.seconds.value > 0
    assert offer.prediction.processor.value > 0
    words = offer.command.replace("forebear", f"{sys.executable} -m forebear").split()
    words[words.index("--out") + 1] = "again"
    subprocess.run(words, check=True, cwd=file.parent, stdout=subprocess.DEVNULL)
    written = sum(p.stat().st_size for p in (file.parent / "again").rglob("*") if p.is_file())
    assert offer.prediction.disk.value == pytest.approx(written, rel=0.05)
    assert sorted(p.name for p in file.parent.iterdir()) == ["again", "small.py"]


def test_a_method_says_what_it_lacks(file: Path) -> None:
    sample = take(Request(str(file), "attribute", "leave_one_out"), memory=8e9, patience=600)
    assert sample.points == []
    assert sample.refused is not None
    assert "limit" in sample.refused or "recipe" in sample.refused


def test_a_sample_that_grows_too_large_is_ended(file: Path) -> None:
    sample = take(Request(str(file), "attribute", "graddot"), memory=5e7, patience=600)
    assert sample.stopped == "a sample took more than 0.05 GB of memory"


def test_a_file_that_fails_says_why(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise RuntimeError('no data here')\n")
    with pytest.raises(ForebearError, match="RuntimeError: no data here"):
        plan_file(path, Limits(seconds=600, memory=8e9, disk=1e9), method="graddot")
