"""What a file defines, attributed by several methods from the command line."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from forebear.attribution import attribute_from_file
from forebear.cli import app
from forebear.errors import FormatError, UnknownNameError
from forebear.gallery import Gallery
from forebear.run import Run, top_path
from forebear.zoo import concepts, digits_diffusion

PLAIN = """
import torch
from torch import nn
import forebear as fb


def points(seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(12) % 2
    return torch.randn(12, 3, generator=generator) + y[:, None], y


def task():
    torch.manual_seed(0)
    print("trained")
    return fb.Task(nn.Linear(3, 2), fb.losses.cross_entropy)


def train():
    return points(1)


def queries():
    return points(2)
"""

DRAWN = """
import torch
import forebear as fb
from forebear.tasks.diffusion import Denoising, images
from forebear.tasks.sampling import Sampler
from forebear.training import Recipe
from forebear.zoo.denoisers import Denoiser

LOSS = Denoising(levels=2)
generator = torch.Generator().manual_seed(0)
PIXELS = torch.rand(14, {channels}, 7, 7, generator=generator) * 2 - 1


def build():
    return Denoiser(({channels}, 7, 7), 8)


def task():
    torch.manual_seed(0)
    return fb.Task(build(), LOSS)


def train():
    return images(PIXELS[:10])


def queries():
    return images(PIXELS[10:], keys=[20, 21, 22, 23])
"""

REMOVAL = """

def counterfactual():
    recipe = Recipe(build, LOSS.training(), learning_rate=1e-3, epochs=1, batch_size=5)
    return fb.Counterfactual(recipe, Sampler(steps=2, clip=True), method="nda", count=2)


def examples():
    return {"train": {3: "the third"}, "queries": {0: "the first"}}
"""

DECODE = """

def decode():
    return lambda latents: latents[:, :1]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "file_of_mine.py"
    path.write_text(text)
    return path


def forebear(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_several_methods_share_one_task(tmp_path: Path) -> None:
    file, out = written(tmp_path, PLAIN), tmp_path / "out"
    done = forebear(
        *("attribute", str(file), "-m", "graddot", "-m", "ekfac", "--out", str(out)),
        *("--option", "ekfac.damping=0.3"),
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("trained") == 1
    run = Run.load(out)
    assert [method.name for method in run.methods] == ["graddot", "ekfac"]
    assert run.best == "ekfac"
    assert run.method("ekfac").settings["damping"] == 0.3
    assert run.kind == "attribute"


def test_a_diffusion_task_gets_the_page_of_its_images(tmp_path: Path) -> None:
    file, out = written(tmp_path, DRAWN.format(channels=1) + REMOVAL), tmp_path / "out"
    options = ("attribute", str(file), "-m", "das", "-m", "nda", "--out", str(out))
    done = forebear(*options, "--option", "nda.patch=3")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip() == f"page: {out / 'report.html'}"
    gallery, run = Gallery.load(out), Run.load(out)
    assert run.title == "file of mine"
    assert [method.name for method in run.methods] == ["das", "nda", "pixels"]
    assert run.method("nda").settings["patch"] == 3
    assert gallery.effect is not None
    assert gallery.effect.method == "nda"
    assert gallery.asked[0].image.caption == "the first"
    page = (out / "report.html").read_text()
    assert "the first" in page
    (out / "report.html").unlink()
    assert forebear("report", str(out)).stdout.strip() == str(out / "report.html")
    assert (out / "report.html").read_text() == page
    top = forebear("top", str(out), "--method", "pixels", "--query", "0", "--k", "3")
    assert "Pixel distance: strongest proponents of query 0 (the first)" in top.stdout
    assert not top_path(out, "das", opponents=True).exists()  # its scores have no sign


def test_latents_are_shown_as_what_decode_makes_of_them(tmp_path: Path) -> None:
    file = written(tmp_path, DRAWN.format(channels=4) + DECODE)
    run = attribute_from_file(file, {"graddot": {}}, tmp_path / "shown")
    assert run.kind == "images"
    assert Gallery.load(tmp_path / "shown").side == [7, 7]
    plain = written(tmp_path, DRAWN.format(channels=4))
    assert attribute_from_file(plain, {"graddot": {}}, tmp_path / "plain").kind == "attribute"


def test_what_does_not_exist_is_refused_before_the_file_is_run(tmp_path: Path) -> None:
    file = written(tmp_path, "raise ZeroDivisionError")
    with pytest.raises(UnknownNameError, match="did you mean 'ekfac'"):
        attribute_from_file(file, {"graddot": {}, "ekfak": {}}, tmp_path / "out")
    with pytest.raises(FormatError, match=r"does not define task\(\)"):
        attribute_from_file(written(tmp_path, ""), {"graddot": {}}, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-m", "das", "-m", "das"], "names one of das, das twice"),
        (["-m", "das", "-m", "nda", "--option", "patch=3"], "write it like das.patch=3"),
    ],
)
def test_options_say_which_method_they_are_for(
    options: list[str], said: str, tmp_path: Path
) -> None:
    file = written(tmp_path, PLAIN)
    done = forebear("attribute", str(file), *options, "--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert said in done.stderr
    assert json.dumps(done.stdout) == '""'


@pytest.mark.parametrize(
    ("example", "task", "methods", "rows"),
    [
        ("generated_digit", digits_diffusion, {"nda": {}}, ["nda", "pixels"]),
        (
            "generated_shapes",
            concepts,
            {"graddot": {}, "concept_trak": {"draws": 9}},
            ["graddot", "pixels"],
        ),
    ],
)
def test_the_examples_run_with_less_training(
    example: str,
    task: Any,
    methods: dict[str, dict[str, Any]],
    rows: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(task, "recipe", partial(task.recipe, epochs=1))
    path = Path(__file__).parents[1] / "examples" / f"{example}.py"
    run = attribute_from_file(path, methods, tmp_path)
    assert [method.name for method in run.methods] == rows
    gallery = Gallery.load(tmp_path)
    assert (gallery.effect is not None) == (example == "generated_digit")
    assert all(one.concepts for one in gallery.asked) == (example == "generated_shapes")
