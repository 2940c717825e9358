"""What goes into the gallery: lists with pictures, and what retrained models made."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear import metrics
from forebear.data import Data
from forebear.gallery import (
    NAME,
    Asked,
    Effect,
    Gallery,
    Listed,
    Mapped,
    Pictured,
    Regenerated,
)
from forebear.generated.counterfactual import Again, Counterfactual
from forebear.generated.pictures import Album, shown
from forebear.metrics.images import WINDOW
from forebear.run import Run, read_texts, scores_folder
from forebear.types import Scores

ON_PAGE = 12
"""Generated images on the page; scores and top lists are of all."""


@dataclass(frozen=True)
class Curator:
    """Chooses what of a run is shown.

    Attributes:
        run: whose methods are scored.
        train: the training images.
        queries: the generated images.
        album: where pictures go; its folder is that of the run.
        top: training images in a row.
    """

    run: Run
    train: Data
    queries: Data
    album: Album
    top: int

    def gallery(
        self, mapped: list[Mapped | None], concepts: Mapping[Any, Scores], side: list[int]
    ) -> Gallery:
        """Generated images with lists, and pictures of every training image in them.

        Maps, concepts and retrained models' pictures of an earlier call stay until made again.
        """
        folder = self.album.folder
        texts = read_texts(folder)
        names = [str(name) for name in self.queries.ids[:ON_PAGE].tolist()]
        batch = self.queries.batch(slice(0, ON_PAGE))
        files = self.album.keep(batch["image"], [f"generated-{i:03d}" for i in range(len(names))])
        order: dict[str, tuple[Tensor, Tensor]] = {}
        for method in self.run.methods:
            order[method.name] = self._strongest(Scores.load(scores_folder(folder, method.name)))
        told = {name: self._strongest(scores) for name, scores in concepts.items()}
        asked = []
        for i, (name, file) in enumerate(zip(names, files, strict=True)):
            image = Pictured(id=name, picture=file, caption=texts["queries"].get(name, ""))
            asked.append(
                Asked(
                    image=image,
                    lists=[_listed(method, found, i) for method, found in order.items()],
                    concepts=[
                        _listed("concept_trak", found, i, about=_name(key, i))
                        for key, found in told.items()
                    ],
                    maps=mapped[i],
                )
            )
        effect = None
        if (folder / NAME).is_file():
            earlier = Gallery.load(folder)
            effect = earlier.effect
            asked = [
                self._with_earlier(one, old, earlier.train)
                for one, old in zip(asked, earlier.asked, strict=True)
            ]
        return replace(self._numbered(asked, texts["train"]), side=side, effect=effect)

    def _with_earlier(self, one: Asked, old: Asked, train: list[Pictured]) -> Asked:
        """What an earlier call found out, in positions, where this one did not ask for it."""
        position = {str(name): i for i, name in enumerate(self.train.ids.tolist())}

        def placed(each: Any) -> Any:
            return replace(each, images=[position[train[number].id] for number in each.images])

        maps = one.maps or (placed(old.maps) if old.maps else None)
        concepts = one.concepts or [placed(each) for each in old.concepts]
        return replace(one, maps=maps, concepts=concepts, again=old.again)

    def _strongest(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Values and positions in the training set, `[q, top]`."""
        rows = scores.values[:ON_PAGE]
        top = min(self.top, rows.shape[1])
        order = rows.argsort(dim=1, descending=True, stable=True)[:, :top]
        return rows.gather(1, order), order

    def _numbered(self, asked: list[Asked], texts: Mapping[str, str]) -> Gallery:
        """Positions in the training set replaced by the numbers of their pictures."""
        numbers: dict[int, int] = {}
        for one in asked:
            for each in [*one.lists, *one.concepts, *([one.maps] if one.maps else [])]:
                for position in each.images:
                    numbers.setdefault(position, len(numbers))
        files = self.album.keep_training(self.train, sorted(numbers))
        ids = {position: str(self.train.ids[position]) for position in numbers}

        def numbered(each: Any) -> Any:
            return replace(each, images=[numbers[position] for position in each.images])

        return Gallery(
            asked=[
                replace(
                    one,
                    lists=[numbered(each) for each in one.lists],
                    concepts=[numbered(each) for each in one.concepts],
                    maps=numbered(one.maps) if one.maps else None,
                )
                for one in asked
            ],
            train=[
                Pictured(id=name, picture=files[position], caption=texts.get(name, ""))
                for position, name in ids.items()
            ],
            side=[],
        )


def compared(
    gallery: Gallery, again: Again, about: Counterfactual, method: str, album: Album
) -> Gallery:
    """The gallery with what retrained models made, and what that says of all images."""
    whole = shown(again.everything, album.decode)
    moved, like = _differences(shown(again.without, album.decode), whole)
    chance = [_differences(shown(images, album.decode), whole) for images in again.random]
    asked = []
    for i, one in enumerate(gallery.asked):
        rows = slice(i, i + 1)
        images = torch.cat([again.everything[rows], again.without[rows], again.random[:, i]])
        files = album.keep(images, [f"again-{i:03d}-{j}" for j in range(len(images))])
        found = Regenerated(
            everything=files[0],
            without=files[1],
            random=files[2:],
            moved=float(moved[i]),
            moved_random=[float(each[i]) for each, _ in chance],
            likeness=None if like is None else float(like[i]),
            likeness_random=[float(each[i]) for _, each in chance if each is not None],
        )
        asked.append(replace(one, again=found))
    shift = metrics.removal_shift(moved, np.concatenate([each for each, _ in chance]))
    effect = Effect(
        method=method,
        count=about.count,
        ratio=shift.ratio if np.isfinite(shift.ratio) else None,
        p=shift.p if len(moved) > 1 else None,
        models=again.models,
        images=len(moved),
    )
    return replace(gallery, asked=asked, effect=effect)


def _name(key: Any, i: int) -> str:
    """Of a concept for one image: the same for all, or its own."""
    return key if isinstance(key, str) else (key[0] if len(key) == 1 else key[i])


def _listed(method: str, found: tuple[Tensor, Tensor], i: int, *, about: str = "") -> Listed:
    values, positions = found
    return Listed(
        method=method, images=positions[i].tolist(), scores=values[i].tolist(), about=about
    )


def _differences(images: Tensor, others: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixel distances, and structural similarities where images are large enough."""
    distances = metrics.pixel_distance(images, others)
    return distances, metrics.ssim(images, others) if min(images.shape[2:]) >= WINDOW else None
