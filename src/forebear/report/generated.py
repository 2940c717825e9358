"""The page of generated images: what stands behind each, and what happens without it."""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forebear.gallery import Asked, Gallery, Listed, read_maps, read_picture
from forebear.report import heat, image_words, words
from forebear.report.meanings import ALIKE, meaning
from forebear.report.page import FONTS, date, environment, font, static
from forebear.run import Run

SMALL = 48
"""Side of pictures up to which their pixels are shown as squares."""

THUMBNAIL = 160

NUMBERED = re.compile(r"(key )?-?\d+")
"""Ids that say nothing to people: positions, and keys of start noise."""

DARK = 40
"""Median grey of the border below which pictures are bright strokes on black."""


@dataclass(frozen=True)
class Slot:
    """A training image in a row.

    Attributes:
        number: in the gallery.
        score: in the method's own units.
        width: of its bar, in percent of the row's largest.
        named: how many methods name it; rows to compare with do not count.
        alike: whether it stands in a row to compare with too.
    """

    number: int
    score: float
    width: float
    named: int = 1
    alike: bool = False


@dataclass(frozen=True)
class Row:
    """A method's training images for one generated image."""

    label: str
    hint: str
    baseline: bool
    checked: bool
    slots: list[Slot]


@dataclass(frozen=True)
class Pair:
    """A training image with both maps: where it matters, and what of it does."""

    number: int
    here: str
    there: str


@dataclass(frozen=True)
class Places:
    """The maps of one generated image; `rare` is orange where few training images fit."""

    pairs: list[Pair]
    rare: str
    most: str
    caption: str


@dataclass(frozen=True)
class Panel:
    """Everything about one generated image."""

    asked: Asked
    name: str
    picture: str
    small: str
    rows: list[Row]
    concepts: list[Row]
    places: Places | None
    agreement: str
    strange: str
    again: dict[str, Any] | None


def render_images(folder: Path, run: Run) -> str:
    """The page as text."""
    gallery = Gallery.load(folder)
    pictures = [_uri(folder, each.picture) for each in gallery.train]
    panels = [
        _panel(folder, run, gallery, asked, place) for place, asked in enumerate(gallery.asked, 1)
    ]
    small = max(gallery.side, default=0) <= SMALL
    return (
        environment()
        .get_template("generated.html.j2")
        .render(
            run=run,
            meaning=meaning,
            kicker=_kicker(folder, run),
            warning=image_words.warning(gallery),
            title=image_words.title(run, gallery),
            headline=image_words.headline(run, gallery),
            figures=_figures(run, gallery),
            gallery=gallery,
            effect=gallery.effect,
            finding=image_words.effect_finding(run, gallery.effect) if gallery.effect else "",
            bars=_bars(gallery),
            panels=panels,
            pictures=pictures,
            methods=run.methods,
            overlaps={m.name: image_words.overlap(gallery, m.name, "pixels") for m in run.methods},
            has={key: any(getattr(m, key) is not None for m in run.methods) for key in OPTIONAL},
            created=date(run.created),
            look=" ".join(
                name
                for name, wanted in (("small", small), ("ink", _is_ink(folder, gallery)))
                if wanted
            ),
            style=static("report.css") + static("generated.css"),
            fonts={name: font(file) for name, file in FONTS.items()},
            script=static("generated.js"),
        )
    )


OPTIONAL = ("coverage", "passes", "lds")


def _panel(folder: Path, run: Run, gallery: Gallery, asked: Asked, place: int) -> Panel:
    again = None
    if asked.again is not None and gallery.effect is not None:
        effect = gallery.effect
        label = image_words.method_label(run, effect.method)
        again = {
            "finding": image_words.again_finding(asked.again, effect.count, label),
            "everything": _small(folder, asked.again.everything),
            "without": _small(folder, asked.again.without),
            "random": _small(folder, asked.again.random[0]),
            "label": label,
            "of": asked.again,
        }
    return Panel(
        asked=asked,
        name=_name(asked, place),
        picture=_uri(folder, asked.image.picture),
        small=_small(folder, asked.image.picture),
        rows=[_row(run, gallery, row, asked) for row in asked.lists],
        concepts=[_row(run, gallery, row) for row in asked.concepts],
        places=_places(folder, asked),
        agreement=image_words.agreement(run, asked),
        strange=image_words.strangeness(gallery, place - 1),
        again=again,
    )


def _name(asked: Asked, place: int) -> str:
    """What a generated image is called: its words, its own id, or its place on the page."""
    image = asked.image
    if image.caption or not NUMBERED.fullmatch(image.id):
        return image.caption or image.id.split("/")[-1]
    return f"Picture {place}"


def _kicker(folder: Path, run: Run) -> str:
    """The title that somebody gave; a folder's name is none."""
    if not run.title or run.title == folder.resolve().name:
        return "Generated images"
    return run.title[0].upper() + run.title[1:]


def _row(run: Run, gallery: Gallery, row: Listed, asked: Asked | None = None) -> Row:
    """A row; of `asked`, where what other rows name is marked in it."""
    baseline = row.method in ALIKE
    settings = {method.name: method.settings for method in run.methods}
    marked = None if baseline else asked
    named = image_words.named_by(marked) if marked else {}
    alike = image_words.looking_alike(marked) if marked else set()
    slots = [
        Slot(number, score, height, named.get(number, 1), number in alike)
        for number, score, height in zip(row.images, row.scores, _heights(row.scores), strict=True)
    ]
    return Row(
        label=row.about or image_words.method_label(run, row.method),
        hint=meaning(row.method, settings.get(row.method)).hint,
        baseline=baseline,
        checked=gallery.effect is not None and gallery.effect.method == row.method,
        slots=slots,
    )


def _heights(scores: list[float]) -> list[float]:
    """Lengths of bars, in percent: shares of the largest score, or of the smallest distance."""
    largest = max(scores, default=0.0)
    if largest > 0:
        return [100 * max(score, 0.0) / largest for score in scores]
    # All below zero: minus distances. The closest has the longest bar.
    return [100 * largest / score if score else 100.0 for score in scores]


def _places(folder: Path, asked: Asked) -> Places | None:
    if asked.maps is None:
        return None
    maps = read_maps(folder, asked.maps.file)
    fewest, most = heat.behind(maps["entropy"])
    here, there = maps["here"], maps["there"]
    return Places(
        pairs=[
            Pair(
                number,
                heat.overlay(here[i], float(here.max())),
                heat.overlay(there[i], float(there[i].max())),
            )
            for i, number in enumerate(asked.maps.images)
        ],
        rare=heat.overlay(heat.rarity(maps["entropy"], max(most, heat.LEAST)), 1.0),
        most=words.count(round(max(most, heat.LEAST))),
        caption=image_words.map_caption(fewest, most),
    )


def _figures(run: Run, gallery: Gallery) -> list[tuple[str, str]]:
    """Up to four numbers for the top of the page, each with what it is."""
    figures = []
    effect = gallery.effect
    if effect is not None and effect.ratio is not None:
        label = image_words.method_label(run, effect.method)
        figures.append(
            (
                words.multiple(effect.ratio),
                f"the change without the {effect.count} images that {label} names first, against "
                f"{effect.count} random ones",
            )
        )
        figures.append((words.count(effect.models), "models trained again to check it"))
    if run.dataset is not None:
        figures.append((words.count(run.dataset.train), "training images looked at"))
    ways = sum(method.name not in ALIKE for method in run.methods)
    alike = len(run.methods) - ways
    beside = f", and {alike} by likeness alone to compare with" if alike else ", side by side"
    figures.append((words.count(ways), f"way{'' if ways == 1 else 's'} to estimate it{beside}"))
    return figures


def _bars(gallery: Gallery) -> list[dict[str, Any]]:
    """How far each image moved, with bars in percent of the longest."""
    moved = [(i, each.again) for i, each in enumerate(gallery.asked) if each.again is not None]
    largest = max((max(one.moved, *one.moved_random) for _, one in moved), default=0.0) or 1.0
    found = []
    for i, one in moved:
        chance = sum(one.moved_random) / len(one.moved_random)
        found.append(
            {
                "panel": i,
                "moved": one.moved,
                "chance": chance,
                "width": 100 * one.moved / largest,
                "width_chance": 100 * chance / largest,
            }
        )
    return found


def _small(folder: Path, file: str) -> str:
    """A picture that stands in several places, no larger than there."""
    from PIL import Image

    content = read_picture(folder, file)
    with Image.open(io.BytesIO(content)) as picture:
        if max(picture.size) <= THUMBNAIL:
            return _uri(folder, file)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _uri(folder: Path, file: str) -> str:
    kind = "png" if file.endswith(".png") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(read_picture(folder, file)).decode()}"


def _is_ink(folder: Path, gallery: Gallery) -> bool:
    """Whether pictures are bright strokes on black, which a light page shows inverted."""
    from PIL import Image

    borders = []
    for each in gallery.train:
        with Image.open(folder / each.picture) as picture:
            if picture.mode != "L":
                return False
            pixels = np.asarray(picture)
        borders += [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    return bool(borders) and float(np.median(np.concatenate(borders))) < DARK
