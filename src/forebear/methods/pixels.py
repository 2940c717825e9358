"""Likeness of pixels: the baseline for images that looks at no model."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from forebear.data import Data, naming, require_finite
from forebear.errors import DataError
from forebear.executors import Executor
from forebear.methods.fitted import NO_MODEL, Fitted, Piece, require_same_columns
from forebear.progress import track
from forebear.stream import BATCH
from forebear.task import Task
from forebear.tasks.images import name_of, require_scaled, type_of
from forebear.types import require_choices

QUERY_NUMBERS = 2**24
"""Pixels of queries held at a time; for more of them the training set is read again."""

CLOSE = 1e-6
"""Squared distances below this share of the lengths are taken from differences."""

CLOSE_NUMBERS = 2**20
"""Numbers of these differences at a time."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Likeness of images pixel by pixel, without any model.

    Images are compared as they are: shifted by a pixel they are already others.

    Attributes:
        metric: `"distance"`, minus the Euclidean distance, or `"cosine"`.
    """

    name: str = "pixels"
    metric: Literal["distance", "cosine"] = "distance"

    def __post_init__(self) -> None:
        require_choices(self)

    def fit(
        self,
        task: Task | None,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "FittedPixels":
        """Look at the first image; all are read for queries, and not kept.

        Args:
            task: plays no part, and may be None; its model goes into the record.
            train: `{"image": [n, ...], ...}` as from `forebear.tasks.diffusion.images`, or any
                dataset whose first column is the images.
            ids: a stable id for each image; positions when left out.
            batch_size: images at a time.
            executor: plays no part.

        Raises:
            DataError: images are no numbers; those of a dict, not scaled.
            NonFiniteError: a pixel is NaN or infinite, with its id.
        """
        data = Data.of(train, ids=ids, collate=None if task is None else task.collate)
        fitted = FittedPixels(self, task, data, batch_size=batch_size, executor=executor)
        with naming(data, slice(0, 1)):
            fitted.numbers = pictures(data.batch(slice(0, 1))).numel()
        return fitted

    def restore(self, task: Task | None, train: Data, tensors: dict[str, Tensor]) -> "FittedPixels":
        """From the number of pixels."""
        fitted = FittedPixels(self, task, train, batch_size=BATCH)
        fitted.numbers = int(tensors["numbers"])
        return fitted


class FittedPixels(Fitted):
    """The training images.

    Attributes:
        numbers: of an image.
    """

    numbers: int

    def __init__(
        self,
        method: Pixels,
        task: Task | None,
        train: Data,
        *,
        batch_size: int,
        executor: Executor | None = None,
    ) -> None:
        super().__init__(method, cast(Task, task), train, batch_size=batch_size, executor=executor)

    @cached_property
    def model_hash(self) -> str:
        """Hash of the task's model, or `NO_MODEL` without a task."""
        return NO_MODEL if self.task is None else self.task.model_hash()

    def _queries(self, queries: Any, ids: Any) -> Data:
        data = Data.of(queries, ids=ids, collate=None if self.task is None else self.task.collate)
        if isinstance(data.columns, tuple):  # of dicts only the images matter here
            require_same_columns(self.train, data)
        own, asked = (tuple(_found(one.batch(slice(0, 1))).shape[1:]) for one in (self.train, data))
        if own != asked:
            raise DataError(
                f"queries are images of shape {asked} and the training set's have {own}: prepare "
                "both in the same way"
            )
        return data

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """Scores of some queries for a batch of images after the other.

        Raises:
            DataError: images are no numbers, not scaled, or of different sizes.
            NonFiniteError: a pixel is NaN or infinite, with ids.
        """
        compare = distances if self.method.metric == "distance" else cosines
        step = max(1, QUERY_NUMBERS // self.numbers)
        for start in range(0, len(queries), step):
            asked = slice(start, min(start + step, len(queries)))
            mine = torch.cat([rows for _, rows in self._rows(queries.slice(asked), "queries")])
            kept = torch.promote_types(mine.dtype, torch.float32)
            for rows, train in self._rows(self.train, "training images"):
                if train.shape[1] != self.numbers:
                    raise DataError(
                        f"training images have {self.numbers} and {train.shape[1]} numbers: give "
                        "them one size"
                    )
                yield asked, rows, compare(mine, train).to(kept)

    def restricted(self, positions: Tensor) -> Self:
        """The images at `positions`."""
        part = self.on(None)
        part.train = self.train.select(positions)
        return part

    def self_influence(self) -> Tensor:
        """The same for all images, `[n]`, which ranks nothing: no distance, or a cosine of one."""
        size = len(self.train)
        return torch.zeros(size) if self.method.metric == "distance" else torch.ones(size)

    def tensors(self) -> dict[str, Tensor]:
        """The number of pixels."""
        return {"numbers": torch.tensor(self.numbers)}

    def _rows(self, data: Data, description: str) -> Iterator[tuple[slice, Tensor]]:
        """Positions and pixels `[b, d]`, checked."""
        steps = -(-len(data) // self.batch_size)
        for rows, batch in track(data.batches(self.batch_size), description, total=steps):
            with naming(data, rows):
                yield rows, pictures(batch).flatten(1)


def pictures(batch: Any) -> Tensor:
    """The images `[b, ...]` of a batch: its column `image`, the first of a tuple, or itself.

    Raises:
        DataError: there are none, or no numbers; those of a dict are not scaled as in training.
        NonFiniteError: a pixel is NaN or infinite.
    """
    image = _found(batch)
    if hasattr(batch, "keys"):
        require_scaled(image)
        return image
    if not (image.is_floating_point() or image.dtype.itemsize == 1):
        raise DataError(
            f"the first column is {name_of(image)}: images are tensors of floating-point numbers "
            "or bytes"
        )
    if image.ndim < 2:
        raise DataError(f"images have shape {tuple(image.shape)}: the first axis counts them")
    if image.is_floating_point():
        require_finite(image, "image")
    return image


def _found(batch: Any) -> Tensor:
    """The images of a batch as they are."""
    if hasattr(batch, "keys") and "image" not in batch:
        raise DataError(
            f"the dataset has {', '.join(map(str, batch))} and no 'image': make it with "
            "forebear.tasks.diffusion.images(pixels)"
        )
    if hasattr(batch, "keys"):
        image = batch["image"]
    else:
        image = batch[0] if isinstance(batch, list | tuple) else batch
    if not isinstance(image, Tensor):
        raise DataError(
            f"images are a {type_of(image)}: give tensors, or a collate function that does"
        )
    return image


def distances(queries: Tensor, rows: Tensor) -> Tensor:
    """Minus the Euclidean distance of rows, float64 `[q, n]`; zero between equal ones.

    Products are many times faster than differences, and lose the digits of short distances: these
    are taken from differences.

    Args:
        queries: `[q, d]`.
        rows: `[n, d]`.
    """
    queries, rows = queries.double(), rows.double()
    sizes = queries.square().sum(1)[:, None] + rows.square().sum(1)
    squares = sizes - 2 * queries @ rows.T
    close = (squares <= CLOSE * sizes).nonzero()
    for part in close.split(max(1, CLOSE_NUMBERS // queries.shape[1])):
        left, right = part[:, 0], part[:, 1]
        squares[left, right] = (queries[left] - rows[right]).square().sum(1)
    return -squares.sqrt()


def cosines(queries: Tensor, rows: Tensor) -> Tensor:
    """Cosines of rows, float64 `[q, n]`; zero where one has no length."""
    tiny = torch.finfo(torch.float64).tiny
    return F.normalize(queries.double(), eps=tiny) @ F.normalize(rows.double(), eps=tiny).T
