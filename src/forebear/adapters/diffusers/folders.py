"""Folders of images with captions or classes, read as they are needed."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from forebear.data import Data
from forebear.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_COLUMNS = ("text", "caption", "prompt")
"""Of `metadata.jsonl`; the first that is there."""

SIXTEEN_BITS = 65535
TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")

Embed = Callable[[Sequence[str]], Tensor]
"""Texts to conditions `[n, tokens, width]`."""


@dataclass(frozen=True)
class Conditions:
    """What each image is told; equal ones are kept once.

    Attributes:
        values: `[u, ...]`.
        rows: `[n]`, which of them belongs to an image.
    """

    values: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Folder:
    """Images of a folder as examples of a diffusion task: `image`, `key` and, if told, `condition`.

    Attributes:
        root: of the folder.
        names: of the files, below it, sorted.
        keys: `[n]`, of noise; they belong to the names, so that other files change nothing.
        size: height and width that images are brought to.
        grey: one channel in place of three.
        conditions: what the images are told.
    """

    root: Path
    names: tuple[str, ...]
    keys: Tensor
    size: tuple[int, int]
    grey: bool = False
    conditions: Conditions | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": self.image(i), **self.rest(i)}

    def rest(self, i: int) -> dict[str, Tensor]:
        """All but the image."""
        if self.conditions is None:
            return {"key": self.keys[i]}
        told = self.conditions.values[self.conditions.rows[i]]
        return {"key": self.keys[i], "condition": told}

    def image(self, i: int) -> Tensor:
        """`[c, h, w]` from -1 to 1.

        Raises:
            DataError: the file is no image, or is damaged.
        """
        from PIL import Image, ImageOps

        path = self.root / self.names[i]
        try:
            with Image.open(path) as opened:
                upright = _flat(ImageOps.exif_transpose(opened), "L" if self.grey else "RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}") from error
        cut = np.array(_brought_to(upright, self.size), dtype=np.float32)
        pixels = torch.from_numpy(cut) / 127.5 - 1
        return pixels[None] if self.grey else pixels.permute(2, 0, 1).contiguous()


def folder(
    path: str | Path,
    *,
    size: int | tuple[int, int],
    grey: bool = False,
    condition: Tensor | Mapping[str, Any] | Literal["folder"] | None = None,
    prompts: Embed | None = None,
) -> Data:
    """A dataset of the images in a folder and the folders below it, read as they are needed.

    Images are turned upright, laid on white where they are transparent, cropped to the middle,
    resized and scaled to [-1, 1]. Ids are file names below the folder, and noise belongs to them.
    Files and folders whose names begin with a dot are left out.

    Args:
        path: of the folder, with files of the types png, jpg, webp or bmp.
        size: of images, or height and width.
        grey: one channel in place of three.
        condition: `[n, ...]` in the order of sorted names; or by name; or `"folder"`: classes by
            the names of the folders that images lie in, sorted and counted from 0.
        prompts: embeds captions, such as `lambda texts: embed(pipeline, texts)`; for captions see
            `captions`.

    Raises:
        DataError: there is no image, an image has no condition, or there is none of that name.
    """
    root = Path(path)
    names = _names(root)
    if condition is not None and prompts is not None:
        raise DataError("condition= and prompts= both say what images are told: pass one of them")
    if prompts is not None:
        told = _embedded(captions(root, names), names, prompts)
    else:
        told = None if condition is None else _conditions(condition, names)
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise DataError(f"size is {size}: it must be at least 1")
    examples = Folder(root, names, keys_of(names), (height, width), grey, told)
    return Data(examples, ids=list(names))


def captions(path: str | Path, names: Sequence[str] | None = None) -> dict[str, str]:
    """The caption of every image of a folder, by name.

    Captions are in a `metadata.jsonl` with a `file_name` and a `text` (or `caption`, or `prompt`)
    on each line, or in a file beside each image: `boat.txt` for `boat.png`.

    Args:
        path: of the folder.
        names: of the images; all when left out.

    Raises:
        DataError: an image has no caption, or a line cannot be read.
    """
    root = Path(path)
    names = _names(root) if names is None else names
    table = root / "metadata.jsonl"
    told = _from_table(table) if table.is_file() else _beside(root, names)
    missing = [name for name in names if name not in told]
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise DataError(
            f"{len(missing)} of {len(names)} images have no caption ({shown}): write them to "
            f"{table.name} or to .txt files beside the images"
        )
    return {name: told[name] for name in names}


def keys_of(names: Sequence[str]) -> Tensor:
    """Integers `[n]` that belong to names."""
    digests = [hashlib.sha256(name.encode()).digest()[:8] for name in names]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])


def _flat(picture: Any, mode: str) -> Any:
    """A picture without transparency, in 8 bits: grey (`L`) or in colour (`RGB`)."""
    from PIL import Image

    if picture.mode.startswith("I"):
        # Grey of 16 bits. Pillow's own conversion makes everything above 255 white.
        values = np.asarray(picture).astype(np.float64)
        return Image.fromarray(np.rint(values / SIXTEEN_BITS * 255).astype(np.uint8)).convert(mode)
    if picture.mode in TRANSPARENT or "transparency" in picture.info:
        # Whatever colour is stored under transparent pixels, nobody has seen it.
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert(mode)


def _brought_to(picture: Any, size: tuple[int, int]) -> Any:
    """The middle of a picture, in the shape that is wanted, and then resized."""
    from PIL import Image

    height, width = size
    scale = min(picture.width / width, picture.height / height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (picture.width - inner[0]) // 2, (picture.height - inner[1]) // 2
    # Cut first: a resampling filter would look beyond the edge of a box.
    cut = picture.crop((left, top, left + inner[0], top + inner[1]))
    return (
        cut if inner == (width, height) else cut.resize((width, height), Image.Resampling.BICUBIC)
    )


def _names(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise DataError(f"{root} is no folder")
    found = (file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    below = (file.relative_to(root) for file in found)
    # Such as ._boat.png, which macOS writes beside boat.png and which is no image.
    names = tuple(sorted(file.as_posix() for file in below if not _is_hidden(file)))
    if not names:
        raise DataError(
            f"{root} has no images: files of the types {', '.join(SUFFIXES)} are read, unless "
            "their name or folder begins with a dot"
        )
    return names


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _conditions(condition: Any, names: tuple[str, ...]) -> Conditions:
    if isinstance(condition, str):
        if condition != "folder":
            raise DataError(f"condition is {condition!r}: pass a tensor, a dict or 'folder'")
        parents = [Path(name).parent.as_posix() for name in names]
        classes = sorted(set(parents))
        rows = torch.tensor([classes.index(parent) for parent in parents])
        return Conditions(torch.arange(len(classes)), rows)
    if isinstance(condition, Mapping):
        missing = [name for name in names if name not in condition]
        if missing:
            raise DataError(f"{len(missing)} images have no condition, such as {missing[0]}")
        values = torch.stack([torch.as_tensor(condition[name]) for name in names])
    else:
        values = torch.as_tensor(condition)
    if len(values) != len(names):
        raise DataError(f"{len(values)} conditions for {len(names)} images: give one each")
    return Conditions(values, torch.arange(len(names)))


def _embedded(texts: dict[str, str], names: tuple[str, ...], embed: Embed) -> Conditions:
    """Each different caption is embedded once."""
    place = {text: i for i, text in enumerate(dict.fromkeys(texts.values()))}
    return Conditions(embed(list(place)), torch.tensor([place[texts[name]] for name in names]))


def _from_table(table: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(_text_of(table).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            column = next(name for name in CAPTION_COLUMNS if name in row)
            if row[column] is not None:
                found[str(row["file_name"])] = str(row[column])
        except (json.JSONDecodeError, StopIteration, KeyError, TypeError) as error:
            raise DataError(
                f"line {number} of {table} has no file_name with a text: {line[:60]!r}"
            ) from error
    return found


def _beside(root: Path, names: Sequence[str]) -> dict[str, str]:
    files = {name: (root / name).with_suffix(".txt") for name in names}
    return {name: _text_of(file).strip() for name, file in files.items() if file.is_file()}


def _text_of(file: Path) -> str:
    """The content of a text file, without the mark that some editors put in front."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}): save "
            f"it as UTF-8, such as with 'iconv -f latin1 -t utf-8 {file.name}'"
        ) from error
