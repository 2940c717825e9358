"""The folder of a run on generated images: what is in it, and what is not done twice."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generated_cases import MADE, SIDE, TRAIN, Small, blobs
from PIL import Image
from torch import Tensor, nn

import forebear as fb
from forebear.data import Data
from forebear.errors import DataError, MismatchError, TaskError, UnknownNameError
from forebear.gallery import Gallery, read_maps
from forebear.methods.concept_trak import concepts
from forebear.methods.influence import Influence
from forebear.methods.nda import NDA
from forebear.run import Run, read_texts, scores_folder
from forebear.tasks.diffusion import Denoising, images
from forebear.types import Scores
from forebear.zoo.denoisers import Denoiser


@pytest.fixture(scope="module")
def folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "blobs"
    run = fb.attribute_images(
        small.task,
        small.train,
        small.generated,
        methods=("graddot", NDA(patch=3), "similarity"),
        counterfactual=small.remove(draws=2),
        out=out,
        top=4,
        texts={"train": {"blob-03.png": "the third"}, "queries": {1: "the one"}},
        title="Blobs",
    )
    assert run == Run.load(out)
    return out


def scores_of(folder: Path, method: str) -> np.ndarray:
    return Scores.load(scores_folder(folder, method)).values.double().numpy()


def test_rows_are_those_of_the_methods_and_of_pixel_distance(folder: Path, small: Small) -> None:
    run, gallery = Run.load(folder), Gallery.load(folder)
    assert run.kind == "images"
    names = ["graddot", "nda", "similarity", "pixels"]
    assert [method.name for method in run.methods] == names
    assert run.best == "graddot"
    ids = small.train.ids.tolist()
    for place, asked in enumerate(gallery.asked):
        assert [row.method for row in asked.lists] == names
        for row in asked.lists:
            values = scores_of(folder, row.method)[place]
            order = np.argsort(-values, kind="stable")[:4]
            assert [gallery.train[n].id for n in row.images] == [ids[i] for i in order]
            assert row.scores == pytest.approx(values[order])


def test_scores_are_those_of_the_methods_alone(folder: Path, small: Small) -> None:
    alone = fb.attribute(small.task, small.train, small.generated, method="graddot")
    assert scores_of(folder, "graddot") == pytest.approx(alone.values.double().numpy())


def test_pixel_distance_is_the_distance(folder: Path, small: Small) -> None:
    mine = small.generated.batch(slice(None))["image"].flatten(1).double().numpy()
    theirs = small.train.batch(slice(None))["image"].flatten(1).double().numpy()
    wanted = -np.sqrt(((mine[:, None] - theirs[None]) ** 2).sum(2))
    assert scores_of(folder, "pixels") == pytest.approx(wanted, rel=1e-5)


def test_similarity_looks_at_nearly_clean_images(small: Small, folder: Path) -> None:
    """A copy of a training image with noise of another key is most similar to it."""
    image = small.train.batch(slice(0, 10))["image"].clone()
    out = folder.parent / "copies"
    copies = images(image, keys=5000 + torch.arange(10))
    fb.attribute_images(small.task, small.train, copies, methods=("similarity",), out=out)
    assert (scores_of(out, "similarity").argmax(1) == np.arange(10)).all()


def test_maps_are_those_of_nda(folder: Path, small: Small) -> None:
    gallery = Gallery.load(folder)
    maps = NDA(patch=3).fit(small.task, small.train).maps(small.generated, 4)
    for place, asked in enumerate(gallery.asked):
        assert asked.maps is not None
        assert [gallery.train[n].id for n in asked.maps.images] == maps.ids[place].tolist()
        found = read_maps(folder, asked.maps.file)
        assert found["here"] == pytest.approx(maps.values[place].numpy())
        assert found["entropy"] == pytest.approx(maps.entropy[place].numpy())
        assert found["there"].shape == (4, SIDE, SIDE)


def test_pictures_are_files_that_show_the_images(folder: Path, small: Small) -> None:
    gallery = Gallery.load(folder)
    position = {name: i for i, name in enumerate(small.train.ids.tolist())}
    for pictured in gallery.train:
        pixels = np.asarray(Image.open(folder / pictured.picture), dtype=float) / 127.5 - 1
        image = small.train.batch(torch.tensor([position[pictured.id]]))["image"][0, 0]
        assert np.abs(pixels - image.clamp(-1, 1).numpy()).max() < 1 / 127
    captions = {pictured.id: pictured.caption for pictured in gallery.train}
    assert captions.get("blob-03.png", "the third") == "the third"
    assert [asked.image.caption for asked in gallery.asked] == ["", "the one", ""]
    assert read_texts(folder)["queries"] == {"1": "the one"}


def test_nothing_is_scored_or_trained_twice(
    folder: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("done again")

    monkeypatch.setattr(Influence, "fit", refuse)
    monkeypatch.setattr(NDA, "fit", refuse)
    monkeypatch.setattr(type(small.recipe), "train_many", refuse)
    before = Gallery.load(folder)
    again = fb.attribute_images(
        small.task,
        small.train,
        small.generated,
        methods=("graddot", NDA(patch=3), "similarity"),
        counterfactual=small.remove(draws=2),
        out=folder,
        top=4,
    )
    assert [m.seconds for m in again.methods] == [m.seconds for m in Run.load(folder).methods]
    assert Gallery.load(folder) == before
    with pytest.raises(AssertionError, match="done again"):
        fb.attribute_images(
            small.task, small.train, small.generated, methods=(NDA(patch=5),), out=folder
        )


def test_a_later_method_joins_the_rows(small: Small, tmp_path: Path) -> None:
    for method in ("random", "graddot"):
        run = fb.attribute_images(
            small.task, small.train, small.generated, methods=(method,), out=tmp_path
        )
    assert [m.name for m in run.methods] == ["random", "graddot", "pixels"]
    rows = [row.method for row in Gallery.load(tmp_path).asked[0].lists]
    assert rows == ["random", "graddot", "pixels"]


def test_a_later_call_keeps_maps_and_what_retrained_models_made(
    folder: Path, small: Small, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    fb.attribute_images(
        small.task, small.train, small.generated, methods=("random",), out=again, top=4
    )
    before, after = Gallery.load(folder), Gallery.load(again)
    assert after.effect == before.effect
    for old, new in zip(before.asked, after.asked, strict=True):
        assert new.again == old.again
        assert old.maps is not None
        assert new.maps is not None
        assert new.maps.file == old.maps.file
        wanted = [before.train[n].id for n in old.maps.images]
        assert [after.train[n].id for n in new.maps.images] == wanted


class Folder:
    """A map-style dataset that counts what is read, as one of files on disk."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns, self.read = columns, [0] * len(columns["image"])

    def __len__(self) -> int:
        return len(self.read)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        self.read[i] += 1
        return {name: column[i] for name, column in self.columns.items()}


def test_of_lazy_images_only_those_shown_are_read_for_the_page(
    small: Small, tmp_path: Path
) -> None:
    lazy = Folder(small.train.batch(slice(None)))
    fb.attribute_images(
        small.task, lazy, small.generated, methods=("random",), out=tmp_path, top=2, ids=None
    )
    once = min(lazy.read)
    assert lazy.read.count(once) >= TRAIN - 2 * 2 * MADE
    # The first few are also looked at for their shape, and for what they take in memory.
    assert max(lazy.read[4:]) == once + 1
    assert max(lazy.read) <= once + 4


def test_colour_latents_and_large_images_become_small_pictures(tmp_path: Path) -> None:
    """Latents `[4, 8, 8]` are shown as what decode makes of them: colour, 200 pixels wide."""
    model = Denoiser((4, 8, 8), 12)
    latent = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)

    def decode(latents: Tensor) -> Tensor:
        assert len(latents) <= 4
        return nn.functional.interpolate(latents[:, :3], size=(200, 300)) / 3

    with pytest.raises(DataError, match=r"\(1, 4, 8, 8\).*pass decode="):
        fb.attribute_images(
            fb.Task(model, Denoising(levels=2)),
            images(latent[:10]),
            images(latent[10:]),
            methods=("graddot",),
            out=tmp_path,
        )
    fb.attribute_images(
        fb.Task(model, Denoising(levels=2)),
        images(latent[:10]),
        images(latent[10:]),
        methods=("graddot", NDA(patch=3, timesteps=(300,))),
        decode=decode,
        out=tmp_path,
    )
    gallery = Gallery.load(tmp_path)
    assert gallery.side == [200, 300]
    large, small = (
        Image.open(tmp_path / file)
        for file in (gallery.asked[0].image.picture, gallery.train[0].picture)
    )
    assert large.size == (300, 200)
    assert small.size == (160, 107)
    assert small.mode == "RGB"
    assert small.format == "JPEG"


def test_each_concept_has_a_row_of_its_own(tmp_path: Path) -> None:
    model = Denoiser((1, SIDE, SIDE), 16, conditions=4)
    told = torch.eye(4)[torch.arange(12) % 4]
    train = images(blobs(12, 0), told)
    asked = images(blobs(2, 1), told[:2], keys=[100, 101])
    quick = {"left": concepts(told[:2], torch.zeros(2, 4), keys=[100, 101])}
    named = {("one", "two"): concepts(told[:2], told[2:4], keys=[100, 101])}
    task = fb.Task(model, Denoising(levels=2))
    fb.attribute_images(
        task,
        train,
        asked,
        methods=("random", fb.ConceptTRAK(draws=4)),
        concepts=quick | named,
        out=tmp_path,
        top=3,
    )
    gallery = Gallery.load(tmp_path)
    assert [row.method for row in gallery.asked[0].lists] == ["random", "pixels"]
    assert [[row.about for row in one.concepts] for one in gallery.asked] == [
        ["left", "one"],
        ["left", "two"],
    ]
    wanted = fb.ConceptTRAK(draws=4).fit(task, train).score(quick["left"])
    top = wanted.top(3).ids.tolist()
    found = [[int(gallery.train[n].id) for n in one.concepts[0].images] for one in gallery.asked]
    assert found == top
    one = concepts(told[:1], told[1:2])
    with pytest.raises(DataError, match="'left' has 1 queries and 1 names for 2 generated images"):
        fb.attribute_images(task, train, asked, concepts={"left": one}, out=tmp_path)


def test_what_cannot_be_shown_is_refused(small: Small, tmp_path: Path) -> None:
    other = fb.Task(nn.Linear(2, 2), fb.losses.cross_entropy)
    with pytest.raises(TaskError, match=r"'cross_entropy'.*use fb\.attribute"):
        fb.attribute_images(other, small.train, small.generated, out=tmp_path)
    for methods, said in (((), "methods names none"), (("das", "concept_trak"), "pass concepts=")):
        with pytest.raises(DataError, match=said):
            fb.attribute_images(
                small.task, small.train, small.generated, methods=methods, out=tmp_path
            )


def test_the_method_of_the_counterfactual_must_be_there(small: Small, tmp_path: Path) -> None:
    about = small.remove(method="daz")
    with pytest.raises(UnknownNameError, match="did you mean 'das'"):
        fb.attribute_images(
            *(small.task, small.train, small.generated),
            methods=("das",),
            counterfactual=about,
            out=tmp_path,
        )
    assert not (tmp_path / "run.json").exists()


def test_another_model_or_kind_of_run_is_refused(small: Small, folder: Path) -> None:
    other = fb.Task(Denoiser((1, SIDE, SIDE), 24, form="clean"), small.task.loss)
    with pytest.raises(MismatchError, match="another model"):
        fb.attribute_images(other, small.train, small.generated, out=folder)
    plain = folder.parent / "plain"
    Run(kind="attribute").save(plain)
    with pytest.raises(MismatchError, match="another kind"):
        fb.attribute_images(small.task, small.train, small.generated, out=plain)


def test_data_keeps_ids_of_generated_images(small: Small, tmp_path: Path) -> None:
    named = Data(small.generated.batch(slice(None)), ids=["a.png", "b.png", "c.png"])
    fb.attribute_images(small.task, small.train, named, methods=("random",), out=tmp_path)
    assert [one.image.id for one in Gallery.load(tmp_path).asked] == ["a.png", "b.png", "c.png"]


def test_one_method_needs_no_tuple(small: Small, tmp_path: Path) -> None:
    for method in ("random", NDA(patch=3)):
        run = fb.attribute_images(
            small.task, small.train, small.generated, methods=method, out=tmp_path
        )
    assert [each.name for each in run.methods] == ["random", "nda", "pixels"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"top": 0}, "top is 0: a row shows at least one"),
        ({"methods": (fb.DAS(), "random", fb.DAS(form="linear"))}, "2 of methods are called 'das'"),
        ({"methods": ("nda", NDA(patch=3))}, "2 of methods are called 'nda'.*out="),
    ],
)
def test_what_would_show_nothing_or_overwrite_is_refused(
    small: Small, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        fb.attribute_images(small.task, small.train, small.generated, out=tmp_path, **wrong)
    assert not (tmp_path / "run.json").exists()


def test_batches_are_chosen_unless_their_size_is_given(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    fit = Influence.fit

    def seen(self: Influence, *data: Any, **settings: Any) -> Any:
        sizes.append(settings.get("batch_size"))
        return fit(self, *data, **settings)

    monkeypatch.setattr(Influence, "fit", seen)
    found = []
    for name, size in (("chosen", None), ("given", 7)):
        fb.attribute_images(
            *(small.task, small.train, small.generated),
            methods="graddot",
            out=tmp_path / name,
            batch_size=size,
        )
        found.append(scores_of(tmp_path / name, "graddot"))
    assert sizes == [None, 7]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
