"""What answers queries: the training images, and scores worked out tile by tile."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from forebear.data import Data
from forebear.errors import DataError, NumericalWarning, TaskError
from forebear.executors import Executor, results
from forebear.methods.fitted import NO_MODEL, Fitted, Piece, require_same_columns
from forebear.methods.nda.images import checked, images_of
from forebear.methods.nda.maps import Maps, Places, Sources, places
from forebear.methods.nda.patches import Rows, Weights, Window, query_rows, tiles, weigh
from forebear.progress import track
from forebear.stream import Result
from forebear.task import Task
from forebear.tasks.noise import gaussian
from forebear.types import check_k

if TYPE_CHECKING:
    from forebear.methods.nda.method import NDA

KEPT_BYTES = 2**28
"""Weights of training images for query positions at a time."""

BLOCK_BYTES = 2**24
"""Training images at a time, with the margin around them."""

EPSILON = torch.finfo(torch.float32).eps

UNCERTAIN = 1e-3
"""Relative error of a weight that rounding may cause, above which float32 warns."""

FLOATS = {"float32": torch.float32, "float64": torch.float64}


class FittedNDA(Fitted):
    """The training images, and the mean of each channel `[c]`, which is taken off all pixels."""

    def __init__(
        self,
        method: "NDA",
        task: Task | None,
        train: Data,
        centre: Tensor,
        *,
        batch_size: int,
        executor: Executor | None = None,
    ) -> None:
        # The two inherited methods that ask the task for something stand below.
        super().__init__(method, cast(Task, task), train, batch_size=batch_size, executor=executor)
        self.centre = centre
        first = images_of(train, slice(0, 1), method.shape)[0]
        self._shape = tuple(first.shape[1:])
        self._dtype = (
            FLOATS[method.dtype]
            if method.dtype
            else torch.promote_types(first.dtype, torch.float32)
        )
        self._device = first.device if task is None else task.device

    @cached_property
    def model_hash(self) -> str:
        """Hash of the task's model, or `NO_MODEL` without a task."""
        return NO_MODEL if self.task is None else self.task.model_hash()

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """Scores of some queries for all training images."""
        tiles = tuple(self._tiles(queries))
        names = [f"tile-{number:06d}" for number in range(len(tiles))]
        work = Tiles(self.on(None), queries, tiles)
        found = results(work, names, f"{self.method.name}, queries", executor=self.executor)
        each = zip(tiles, found, strict=True)
        for (first, last), group in groupby(each, lambda pair: (pair[0].first, pair[0].last)):
            scores = torch.zeros((), dtype=self._dtype, device=self._device)
            for tile, result in group:
                scores = scores + tile.share * result["scores"].to(scores.device)
            yield slice(first, last), slice(0, len(self.train)), scores

    def self_influence(self) -> Tensor:
        """Score of each training image for itself, `[n]`: what no other image explains.

        Duplicates and images of common parts share their weights and have less. It takes as much
        as scoring the whole training set.
        """
        own = [
            values[torch.arange(len(values)), torch.arange(rows.start, rows.stop)].cpu()
            for rows, _, values in self.pieces(self.train)
        ]
        return torch.cat(own)

    def tensors(self) -> dict[str, Tensor]:
        """The means of the channels."""
        return {"centre": self.centre}

    def maps(self, queries: Any, top: int = 10, *, ids: Any = None) -> Maps:
        """Where in each query its `top` training images matter.

        With several timesteps, weights and entropies are averaged over them.

        Raises:
            TaskError: scores mix two scales, whose positions are not the same.
        """
        return self.maps_and_sources(queries, top, ids=ids)[0]

    def sources(self, queries: Any, top: int = 10, *, ids: Any = None) -> Sources:
        """Where in its `top` training images each query finds what it needs.

        With several timesteps, weights are averaged over them.

        Raises:
            TaskError: scores mix two scales, whose positions are not the same.
        """
        return self.maps_and_sources(queries, top, ids=ids)[1]

    def maps_and_sources(
        self, queries: Any, top: int = 10, *, ids: Any = None
    ) -> tuple[Maps, Sources]:
        """What `maps` and `sources` say of the same queries, for the price of one of them.

        Raises:
            TaskError: scores mix two scales, whose positions are not the same.
        """
        data, numbers, found, entropy = self._placed(queries, top, ids)
        about = {"query_ids": data.ids, "ids": self.train.ids[numbers.numpy()]}
        here, there, best = (
            torch.stack(each).cpu()
            for each in zip(*((one.here, one.there, one.best) for one in found), strict=True)
        )
        return (
            Maps(**about, values=here, entropy=entropy.cpu()),
            Sources(**about, values=there, best=best),
        )

    def _placed(
        self, queries: Any, top: int, ids: Any
    ) -> tuple[Data, Tensor, list[Places], Tensor]:
        """Queries, positions of their top training images `[q, m]`, maps, entropies `[q, h, w]`."""
        if len(self.method.windows) > 1:
            raise TaskError(
                "maps of scale='both' have positions of two kinds: fit NDA(scale='single') or "
                "NDA(scale='downscaled') for them"
            )
        check_k(top, len(self.train))
        data = self._queries(queries, ids)
        ((_, window),) = self.method.windows
        numbers, found, entropy = [], [], []
        for rows in track(self._chunks(data), f"{self.method.name}, queries"):
            weighed = self._weigh(data, rows, window, entropies=True)
            self.require_finite(weighed.scores, data.ids[rows])
            order = weighed.scores.argsort(dim=1, descending=True, stable=True)[:, :top].cpu()
            for query, images in enumerate(order):
                found.append(
                    places(
                        weighed.rows,
                        weighed.normaliser,
                        query,
                        self._centred(images),
                        window,
                        self.method.most,
                    )
                )
            numbers.append(order)
            entropy.append(weighed.entropy.mean(0))
        return data, torch.cat(numbers), found, torch.cat(entropy)

    def warn_of_rounding(self, reach: Tensor) -> None:
        """Warn where logits are so large that float32 has few digits left for their differences.

        Args:
            reach: `[c]`, how far pixels are from the centre.
        """
        if self._dtype != torch.float32:
            return
        wide = max(window.ratio for _, window in self.method.windows)
        trained = wide * reach.norm().item() * self.method.patch
        for level in self.method.timesteps:
            signal, strength = self.method.levels.at(level)
            noisy = math.hypot(signal * trained, strength * self.method.patch)
            error = EPSILON / 2 * noisy * trained * signal / strength**2
            if error > UNCERTAIN:
                warnings.warn(
                    f"at timestep {level} rounding may move weights by {error:.1%} of themselves: "
                    "use NDA(dtype='float64'), or a later timestep",
                    NumericalWarning,
                    stacklevel=3,
                )

    def _queries(self, queries: Any, ids: Any) -> Data:
        data = Data.of(queries, ids=ids, collate=None if self.task is None else self.task.collate)
        if isinstance(data.columns, tuple):  # of dicts only the images matter here
            require_same_columns(self.train, data)
        for images in checked(data, self.method.shape, self.batch_size):
            if tuple(images.shape[1:]) != self._shape:
                raise DataError(
                    f"queries are images of shape {tuple(images.shape[1:])} and the training set's "
                    f"have {self._shape}: prepare both in the same way"
                )
        return data

    def _chunks(self, queries: Data) -> list[slice]:
        """Queries at a time, so many that the weights of all training images fit in memory."""
        positions = max(_positions(self._shape, window) for _, window in self.method.windows)
        step = max(1, self._most_rows() // (positions * len(self.method.timesteps)))
        return [
            slice(start, min(start + step, len(queries))) for start in range(0, len(queries), step)
        ]

    def _tiles(self, queries: Data) -> Iterator["Tile"]:
        """Positions of queries at a time, group after group of queries."""
        levels = len(self.method.timesteps)
        for rows in self._chunks(queries):
            for share, window in self.method.windows:
                total = levels * (rows.stop - rows.start) * _positions(self._shape, window)
                most = self._most_rows()
                for number in range(-(-total // most)):
                    yield Tile(rows.start, rows.stop, share, window, most, number)

    def _most_rows(self) -> int:
        """Query positions whose coefficients and weights of all training images fit in memory."""
        numbers = len(self.train) + 3 * self._shape[0] * self.method.patch**2
        return max(1, KEPT_BYTES // (numbers * self._dtype.itemsize))

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The training images in order, centred, so many as fit in `BLOCK_BYTES`."""
        channels, height, width = self._shape
        margin = 2 * max(window.padding for _, window in self.method.windows)
        numbers = channels * (height + margin) * (width + margin)
        step = max(1, BLOCK_BYTES // (numbers * self._dtype.itemsize))
        for start in range(0, len(self.train), step):
            rows = slice(start, min(start + step, len(self.train)))
            yield rows, self._centred(rows)

    def _centred(self, rows: slice | Tensor) -> Tensor:
        images = images_of(self.train, rows, self.method.shape)[0].to(self._device, self._dtype)
        return images - self.centre.to(images)[:, None, None]

    def _weigh(
        self, queries: Data, rows: slice, window: Window, *, entropies: bool = False
    ) -> "_Weighed":
        """Weights of all training images for some queries."""
        parts = self._rows(queries, rows, window)
        levels, count = len(self.method.timesteps), rows.stop - rows.start
        extent = [window.positions(pixels) for pixels in self._shape[1:]]
        scores = self._no_scores(count)
        normaliser = scores.new_zeros(levels, count, *extent, dtype=torch.double)
        entropy = torch.zeros_like(normaliser)
        for tile in tiles(parts, self._most_rows()):
            for part in self.weights(tile, window, entropies=entropies):
                part.add_scores(scores, 1.0 / levels)
                normaliser.view(-1)[part.rows.place] = part.normaliser
                if entropies:
                    entropy.view(-1)[part.rows.place] = part.entropy()
        return _Weighed(parts, scores, normaliser, entropy)

    def weights(
        self, tile: list[Rows], window: Window, *, entropies: bool = False
    ) -> list[Weights]:
        """Weights of all training images for some positions of queries."""
        size, most = len(self.train), self.method.most
        return weigh(tile, self._blocks, size, window, most, entropies=entropies)

    def tile_scores(self, queries: Data, tile: "Tile") -> Tensor:
        """What some positions add to the scores of their queries, `[q, n]`."""
        rows = slice(tile.first, tile.last)
        every = tiles(self._rows(queries, rows, tile.window), tile.most)
        scores = self._no_scores(tile.last - tile.first)
        for part in self.weights(next(islice(every, tile.number, None)), tile.window):
            part.add_scores(scores, 1.0 / len(self.method.timesteps))
        return scores

    def _no_scores(self, queries: int) -> Tensor:
        return torch.zeros(queries, len(self.train), dtype=self._dtype, device=self._device)

    def _rows(self, queries: Data, rows: slice, window: Window) -> list[Rows]:
        """Positions of noisy queries, noise level by noise level."""
        images, keys = images_of(queries, rows, self.method.shape)
        images, keys = images.to(self._device, torch.double), keys.to(self._device)
        centre = self.centre.to(images)[:, None, None]
        scaled, factors = [], []
        for level in self.method.timesteps:
            signal, strength = self.method.levels.at(level)
            noise = gaussian(keys, self._shape, self.method.seed, level, 0, dtype=torch.double)
            # Both sides lose the centre: it cancels in differences, and logits get smaller.
            noisy = signal * (images - centre) + strength * noise
            scaled.append(noisy * (signal / strength**2))
            factors.append(images.new_full((len(images),), -0.5 * (signal / strength) ** 2))
        both = torch.cat(scaled).to(self._dtype), torch.cat(factors).to(self._dtype)
        return query_rows(*both, len(images), window)


@dataclass(frozen=True)
class Tile:
    """Positions of some queries, as many as fit in memory with all training images.

    Attributes:
        first: of the queries.
        last: the one after them.
        share: of the window's scores.
        window: the patch.
        most: positions of a tile.
        number: of the tile among those of the same queries and window.
    """

    first: int
    last: int
    share: float
    window: Window
    most: int
    number: int


@dataclass(frozen=True)
class Tiles:
    """Scores of tiles by number; goes to other processes.

    Attributes:
        fitted: the training images.
        queries: all of them.
        tiles: of these.
    """

    fitted: FittedNDA
    queries: Data
    tiles: tuple[Tile, ...]

    def __call__(self, number: int) -> Result:
        """`"scores"` `[q, n]`."""
        return {"scores": self.fitted.tile_scores(self.queries, self.tiles[number]).cpu()}


@dataclass(frozen=True, eq=False)
class _Weighed:
    """Weights of all training images for some queries.

    Attributes:
        rows: the queries' positions, group by group.
        scores: `[q, n]`.
        normaliser: `[t, q, h, w]`, logarithms of the sums of exponentials.
        entropy: `[t, q, h, w]`, of the weights of images, if asked for.
    """

    rows: list[Rows]
    scores: Tensor
    normaliser: Tensor
    entropy: Tensor


def _positions(shape: tuple[int, ...], window: Window) -> int:
    """Positions of a patch in an image."""
    return window.positions(shape[1]) * window.positions(shape[2])
