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
