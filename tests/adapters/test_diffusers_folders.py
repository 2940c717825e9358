"""Folders of images: pixels, captions, classes, ids and keys."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import forebear as fb
from forebear.adapters.diffusers.folders import Folder
from forebear.errors import DataError


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_images_are_read_sorted_and_scaled_with_file_names_as_ids(tmp_path: Path) -> None:
    pictures = {f"{name}.png": noise(6, 6, 3, seed=i) for i, name in enumerate(("b", "a", "c/d"))}
    for name, pixels in pictures.items():
        write(tmp_path / name, pixels)
    (tmp_path / "notes.md").write_text("no image")
    data = fb.diffusers.folder(tmp_path, size=6)
    assert data.ids.tolist() == ["a.png", "b.png", "c/d.png"]
    batch = data.batch(slice(None))
    for image, name in zip(batch["image"], data.ids, strict=True):
        expected = torch.from_numpy(pictures[name].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        assert torch.equal(image, expected)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].min() >= -1
    assert batch["image"].max() <= 1


def test_only_the_images_that_are_asked_for_are_opened(tmp_path: Path) -> None:
    for i in range(4):
        write(tmp_path / f"{i}.png", noise(6, 6, seed=i))
    data = fb.diffusers.folder(tmp_path, size=6, grey=True)
    (tmp_path / "3.png").write_bytes(b"broken")
    assert data.batch(slice(0, 3))["image"].shape == (3, 1, 6, 6)
    assert isinstance(data.dataset, Folder)
    with pytest.raises(DataError, match=r"3\.png cannot be read"):
        data.batch(slice(3, 4))


def test_the_middle_is_cut_out_and_resized(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200  # the middle third
    write(tmp_path / "wide.png", pixels)
    for size, shape in ((4, (4, 4)), ((8, 8), (8, 8))):
        image = fb.diffusers.folder(tmp_path, size=size).batch(slice(None))["image"]
        assert image.shape == (1, 3, *shape)
        torch.testing.assert_close(image, torch.full_like(image, 200 / 127.5 - 1))
    grey = fb.diffusers.folder(tmp_path, size=(8, 24), grey=True).batch(slice(None))["image"]
    assert torch.equal(grey[0, 0] > 0, torch.from_numpy(pixels[..., 0] > 0))


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((6, 6, 3), np.uint8)
    pixels[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = fb.diffusers.folder(tmp_path, size=6).batch(slice(None))["image"][0, 0]
    assert torch.equal(image[:3], torch.ones(3, 6))
    assert torch.equal(image[3:], -torch.ones(3, 6))


def only(path: Path, *, grey: bool = False) -> Tensor:
    """The one image of a folder, in levels from 0 to 255."""
    image = fb.diffusers.folder(path, size=4, grey=grey).batch(slice(None))["image"]
    return (image[0] + 1) * 127.5


def test_sixteen_bits_keep_their_greys(tmp_path: Path) -> None:
    greys = np.linspace(0, 255, 16).round().reshape(4, 4)
    Image.fromarray((greys * 257).astype(np.uint16)).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as opened:
        assert opened.mode.startswith("I")
    torch.testing.assert_close(only(tmp_path, grey=True)[0], torch.tensor(greys).float())
    torch.testing.assert_close(only(tmp_path), torch.tensor(greys).float().expand(3, 4, 4))


def test_transparent_pixels_are_white_whatever_colour_they_hide(tmp_path: Path) -> None:
    """Red, half of it transparent or nearly so, in every way that PNG has to say so."""
    red = np.zeros((4, 4, 4), np.uint8)
    red[..., 0], red[2:, :, 3], red[:2, :, 3] = 200, 255, 0
    full = Image.fromarray(red)
    palette = Image.fromarray(np.repeat(np.array([[0], [0], [1], [1]], np.uint8), 4, 1), "P")
    palette.putpalette([0, 255, 0, 200, 0, 0])
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    keyed.paste((200, 0, 0), (0, 2, 4, 4))
    expected = torch.tensor([255.0, 255.0, 255.0])[:, None, None].repeat(1, 4, 4)
    expected[:, 2:] = torch.tensor([200.0, 0.0, 0.0])[:, None, None]
    named: list[tuple[Image.Image, Any]] = [(full, None), (palette, 0), (keyed, (1, 2, 3))]
    for picture, hidden in named:
        picture.save(tmp_path / "a.png", **({} if hidden is None else {"transparency": hidden}))
        torch.testing.assert_close(only(tmp_path), expected)
    grey = np.array([[[50, 0], [50, 255]], [[50, 51], [50, 102]]], np.uint8).repeat(2, 0)
    Image.fromarray(grey.repeat(2, 1)).save(tmp_path / "a.png")
    found = only(tmp_path, grey=True)[0, ::2, ::2]
    torch.testing.assert_close(found, torch.tensor([[255.0, 50.0], [214.0, 173.0]]))


@pytest.mark.parametrize(
    ("mode", "suffix", "colour", "close"),
    [
        ("1", "png", (255, 255, 255), 0),
        ("L", "png", (120, 120, 120), 0),
        ("P", "png", (200, 90, 30), 0),
        ("P", "bmp", (200, 90, 30), 0),
        ("CMYK", "jpg", (200, 90, 30), 3),
    ],
)
def test_every_kind_of_file_gives_its_colours(
    mode: str, suffix: str, colour: tuple[int, int, int], close: int, tmp_path: Path
) -> None:
    picture = Image.new("RGB", (4, 4), colour).convert(mode)
    if mode == "P":
        picture = Image.new("P", (4, 4), 1)
        picture.putpalette([0, 0, 0, *colour])
    picture.save(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as opened:
        assert opened.mode == mode
    found = only(tmp_path)
    assert (found - torch.tensor(colour).float()[:, None, None]).abs().max() <= close + 1e-3


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    write(tmp_path / "a.png", noise(4, 4, 3))
    write(tmp_path / ".thumbnails/a.png", noise(4, 4, 3))
    (tmp_path / "._a.png").write_bytes(b"of macOS")
    assert fb.diffusers.folder(tmp_path, size=4).ids.tolist() == ["a.png"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="begins with a dot"):
        fb.diffusers.folder(tmp_path, size=4)


def test_captions_in_another_encoding_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.png", noise(4, 4, 3))
    (tmp_path / "a.txt").write_bytes("un café".encode("latin1"))
    with pytest.raises(
        DataError, match=r"a\.txt is not UTF-8 \(byte 6 is 0xe9\): save it as UTF-8"
    ):
        fb.diffusers.captions(tmp_path)
    (tmp_path / "a.txt").write_bytes("un café\n".encode("utf-8-sig"))
    assert fb.diffusers.captions(tmp_path) == {"a.png": "un café"}
    table = tmp_path / "metadata.jsonl"
    table.write_bytes('{"file_name": "a.png", "text": "un café"}'.encode("latin1"))
    with pytest.raises(DataError, match=r"metadata\.jsonl is not UTF-8"):
        fb.diffusers.captions(tmp_path)
    table.write_text('{"file_name": "a.png", "text": null}')
    with pytest.raises(DataError, match=r"1 of 1 images have no caption"):
        fb.diffusers.captions(tmp_path)


def test_keys_belong_to_names_whatever_else_is_in_the_folder(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.png", noise(4, 4, seed=i))
    before = fb.diffusers.folder(tmp_path, size=4).batch(slice(None))["key"]
    write(tmp_path / "0a.png", noise(4, 4))
    after = fb.diffusers.folder(tmp_path, size=4).batch(slice(None))["key"]
    assert torch.equal(after[[0, 2, 3]], before)
    assert len(set(after.tolist())) == 4


def letters(texts: Any) -> Tensor:
    """An embedding that can be read back."""
    return torch.tensor([[[float(len(text)), float(ord(text[0]))]] for text in texts])


def test_captions_come_from_a_table_or_from_files_beside_images(tmp_path: Path) -> None:
    told = {"a.png": "zebra", "b.jpg": "cat", "c/d.png": "zebra"}
    for i, name in enumerate(told):
        write(tmp_path / name, noise(4, 4, 3, seed=i))
        (tmp_path / name).with_suffix(".txt").write_text(told[name] + "\n")
    assert fb.diffusers.captions(tmp_path) == told
    rows = [{"file_name": name, "text": text.upper()} for name, text in told.items()]
    lines = [json.dumps(row) for row in reversed(rows)]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(lines) + "\n")  # blank lines, any order
    assert fb.diffusers.captions(tmp_path) == {name: text.upper() for name, text in told.items()}
    asked: list[list[str]] = []

    def embed(texts: Any) -> Tensor:
        asked.append(list(texts))
        return letters(texts)

    data = fb.diffusers.folder(tmp_path, size=4, prompts=embed)
    assert asked == [["ZEBRA", "CAT"]]  # each once
    expected = letters(["ZEBRA", "CAT", "ZEBRA"])
    assert torch.equal(data.batch(slice(None))["condition"], expected)


def test_images_without_a_caption_are_named(tmp_path: Path) -> None:
    for i in range(5):
        write(tmp_path / f"{i}.png", noise(4, 4, seed=i))
    (tmp_path / "2.txt").write_text("two")
    with pytest.raises(DataError, match=r"4 of 5 images have no caption \(0.png, 1.png, 3.png …\)"):
        fb.diffusers.folder(tmp_path, size=4, prompts=letters)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"text": "b"}')
    with pytest.raises(DataError, match=r"line 2 of .*metadata.jsonl"):
        fb.diffusers.captions(tmp_path)


def test_conditions_by_position_by_name_and_by_folder(tmp_path: Path) -> None:
    for i, name in enumerate(("dog/1.png", "cat/1.png", "cat/2.png")):
        write(tmp_path / name, noise(4, 4, seed=i))

    def told(condition: Any) -> list[int]:
        data = fb.diffusers.folder(tmp_path, size=4, condition=condition)
        return data.batch(slice(None))["condition"].tolist()

    assert told("folder") == [0, 0, 1]
    assert told(torch.tensor([5, 6, 7])) == [5, 6, 7]
    assert told({"cat/2.png": 1, "cat/1.png": 2, "dog/1.png": 3}) == [2, 1, 3]
    for wrong, message in (
        (torch.tensor([1]), "1 conditions for 3 images"),
        ({"cat/1.png": 2}, "2 images have no condition, such as cat/2.png"),
        ("label", "condition is 'label'"),
    ):
        with pytest.raises(DataError, match=message):
            told(wrong)
    with pytest.raises(DataError, match="both say"):
        fb.diffusers.folder(tmp_path, size=4, condition="folder", prompts=letters)


def test_empty_folders_and_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no images"):
        fb.diffusers.folder(tmp_path, size=4)
    with pytest.raises(DataError, match="is no folder"):
        fb.diffusers.folder(tmp_path / "missing", size=4)
    write(tmp_path / "a.png", noise(4, 4))
    with pytest.raises(DataError, match="size is 0"):
        fb.diffusers.folder(tmp_path, size=0)
