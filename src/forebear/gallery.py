"""What a run on generated images keeps for its page: pictures, lists, maps and what removal did.

    gallery.json              all of this (`Gallery`); files by their name in the folder
    pictures/                 generated, regenerated and training images, as PNG or JPEG
    maps/                     NDA's weights, position by position (safetensors)
    concepts/                 scores of concepts
    counterfactual/           images that retrained models made (safetensors)

Nothing here imports torch.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from forebear.errors import FormatError
from forebear.run import read_object, typed

NAME = "gallery.json"


@dataclass(frozen=True, kw_only=True)
class Pictured:
    """An image with its id, the file of its picture, and words for people."""

    id: str
    picture: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Training images in the order of a ranking, by their number in `Gallery.train`.

    Attributes:
        method: the registered name.
        images: strongest first.
        scores: of each.
        about: what is asked about the image: a concept, or nothing for the image as it is.
    """

    method: str
    images: list[int]
    scores: list[float]
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """Where in an image its strongest training images matter.

    Attributes:
        file: safetensors with `here` `[m, h, w]`, weights of each training image at each position
            of the generated one; `there` `[m, h, w]`, weights of the positions of the training
            image; `entropy` `[h, w]` over all training images.
        images: `[m]`, by their number in `Gallery.train`.
    """

    file: str
    images: list[int]


@dataclass(frozen=True, kw_only=True)
class Regenerated:
    """What retrained models make of the start noise of an image.

    Attributes:
        everything: picture of the model that was trained again on all images.
        without: picture of the one trained without the image's strongest training images.
        random: pictures of those trained without as many random ones.
        moved: pixel distance between `without` and `everything`.
        moved_random: between each of `random` and `everything`.
        likeness: structural similarity of `without` and `everything`, at most 1; None for images
            that are too small for it.
        likeness_random: of each of `random`.
    """

    everything: str
    without: str
    random: list[str]
    moved: float
    moved_random: list[float]
    likeness: float | None = None
    likeness_random: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A generated image and what was found about it."""

    image: Pictured
    lists: list[Listed]
    concepts: list[Listed] = field(default_factory=list)
    maps: Mapped | None = None
    again: Regenerated | None = None


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What the removal changed, over all generated images.

    Attributes:
        method: that chose what was removed.
        count: training images removed for each generated one.
        ratio: of the mean pixel distance to that after removing random ones.
        p: of the one-sided Mann-Whitney test that it is larger; None for a single image.
        models: retrained.
        images: generated images in the comparison.
    """

    method: str
    count: int
    ratio: float | None
    p: float | None
    models: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Familiar:
    """How well the model knows the images that it made, by its own loss.

    Attributes:
        losses: of the generated images that the page shows.
        median: of training images.
        largest: of them.
        among: how many training images were looked at.
        share: their mean loss as a share of that of knowing the mean image alone, at the level of
            noise where it is smallest; None where nothing can be said.
    """

    losses: list[float]
    median: float
    largest: float
    among: int
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Everything in `gallery.json`.

    Attributes:
        asked: generated images, those that the page shows.
        train: training images in any of the lists, each once.
        side: height and width of the pictures as the model makes them.
        effect: of the removal, where one was made.
        familiar: what the model's own loss says of the generated images.
    """

    asked: list[Asked]
    train: list[Pictured]
    side: list[int]
    effect: Effect | None = None
    familiar: Familiar | None = None

    @classmethod
    def load(cls, folder: str | Path) -> "Gallery":
        """Read `gallery.json` of the folder of a run.

        Raises:
            FormatError: it is missing or damaged.
        """
        path = Path(folder) / NAME
        if not path.is_file():
            raise FormatError(
                f"{folder} has no {NAME}: write it with 'forebear attribute' or "
                "forebear.attribute_images"
            )
        return typed(cls, read_object(path), str(path))

    def save(self, folder: str | Path) -> Path:
        """Write `gallery.json`, whole or not at all, and return its path."""
        path = Path(folder) / NAME
        partial = path.with_suffix(".json.partial")
        partial.write_text(json.dumps({"format": 1, **asdict(self)}, indent=1) + "\n")
        partial.replace(path)
        return path


def read_picture(folder: Path, file: str) -> bytes:
    """The content of a picture of a gallery.

    Raises:
        FormatError: it is missing, or the name leads out of the folder.
    """
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise FormatError(f"{folder} has no picture {file!r}: run again")
    return path.read_bytes()


def read_maps(folder: Path, file: str) -> dict[str, np.ndarray]:
    """`here`, `there` and `entropy` of a `Mapped`.

    Raises:
        FormatError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(folder / file)
        return {name: found[name] for name in ("here", "there", "entropy")}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise FormatError(
            f"{folder / file} is damaged ({error}): delete it and run again"
        ) from None
