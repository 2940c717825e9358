"""The method: its configuration, and what answers queries."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor

from forebear.data import Data
from forebear.errors import DataError, NumericalWarning, TaskError, unknown_name
from forebear.executors import Executor
from forebear.methods.fitted import Fitted, Piece, require_same_columns
from forebear.methods.nda.images import checked, images_of
from forebear.methods.nda.maps import Maps, Places, Sources, places
from forebear.methods.nda.patches import Rows, Window, query_rows, tiles, weigh
from forebear.progress import track
from forebear.stream import BATCH
from forebear.task import Task
from forebear.tasks.noise import gaussian
from forebear.tasks.schedules import Discrete, Level, Schedule
from forebear.types import check_k, require_choices

KEPT_BYTES = 2**28
"""Weights of training images for query positions at a time."""

BLOCK_BYTES = 2**24
"""Training images at a time, with the margin around them."""

EPSILON = torch.finfo(torch.float32).eps

UNCERTAIN = 1e-3
"""Relative error of a weight that rounding may cause, above which float32 warns."""

FLOATS = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class NDA:
    """Nonparametric diffusion attribution: softmax weights of training patches, no model.

    Of a finite data set the optimal denoiser is an average of training images, weighted by how
    likely each made the noisy image. Networks denoise locally, so the weights are taken patch by
    patch: position `u` of the noisy query `x_t` gives the patch at `v` of image `n` the weight
    `softmax over (n, v) of −|P_u x_t − s P_v z_n|² / 2σ²`; the score of an image is the sum of its
    weights over all `u` and `v`. All scores are at least zero.

    Attributes:
        patch: points on a side of a patch, odd.
        scale: `"single"`: patches of pixels; `"downscaled"`: patches `ratio` times as wide, seen at
            `1/ratio` of the resolution; `"both"`: `alpha` of the first and the rest of the second.
        alpha: share of single-scale scores in `"both"`.
        ratio: pixels on a side of the blocks of the downscaled scale.
        timesteps: levels of the schedule; scores are averaged over them.
        keep: an image's weight at a position is the sum of its so many largest; None takes all.
        schedule: what is left of an image at a level; `Discrete.linear()` when None.
        shape: `(c, h, w)` of the images, for datasets that have them as flat rows.
        dtype: of the arithmetic; that of the images, at least float32, when None.
        seed: of the noise in queries, which belongs to each query's key.
    """

    name: str = "nda"
    patch: int = 5
    scale: Literal["single", "downscaled", "both"] = "single"
    alpha: float = 0.5
    ratio: int = 2
    timesteps: tuple[Level, ...] = (50,)
    keep: int | None = 100
    schedule: Schedule | None = None
    shape: tuple[int, int, int] | None = None
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_choices(self)
        if self.patch < 1 or (self.patch % 2 == 0 and self.scale != "downscaled"):
            raise TaskError(
                f"patch is {self.patch}: a patch has a middle pixel, so its side must be odd; even "
                "ones are for scale='downscaled'"
            )
        if self.scale != "single" and self.ratio < 2:
            raise TaskError(f"ratio is {self.ratio}: blocks must have at least 2 pixels on a side")
        if not 0 <= self.alpha <= 1:
            raise TaskError(f"alpha is {self.alpha}: it is a share, from 0 to 1")
        if self.keep is not None and self.keep < 1:
            raise TaskError(f"keep is {self.keep}: keep at least 1 weight, or all with None")
        if self.dtype is not None and self.dtype not in FLOATS:
            raise unknown_name("dtype of NDA", self.dtype, FLOATS)
        if not self.timesteps:
            raise TaskError("timesteps is empty: name at least one")
        for level in self.timesteps:
            if self.levels.at(level)[1] == 0:
                raise TaskError(f"timestep {level} has no noise: choose a later one")

    @property
    def levels(self) -> Schedule:
        """The schedule."""
        return Discrete.linear() if self.schedule is None else self.schedule

    @property
    def windows(self) -> tuple[tuple[float, Window], ...]:
        """Patches, each with the share of its scores."""
        single, wide = Window(self.patch), Window(self.patch, self.ratio)
        if self.scale == "single":
            return ((1.0, single),)
        if self.scale == "downscaled":
            return ((1.0, wide),)
        return ((self.alpha, single), (1.0 - self.alpha, wide))

    def fit(
        self,
        task: Task | None,
        train: Any,
        *,
        ids: Any = None,
        batch_size: int = BATCH,
        executor: Executor | None = None,
    ) -> "FittedNDA":
        """Look at every image once: its shape, its range and the mean of each channel.

        Args:
            task: plays no part, and may be None; its model goes into the record.
            train: `{"image": [n, c, h, w], ...}` as from `forebear.tasks.diffusion.images`, or any
                dataset whose first column is the images.
            ids: a stable id for each image; positions when left out.
            batch_size: images at a time while they are checked.
            executor: plays no part: all is done in this process.

        Raises:
            DataError: images are integers, not scaled, or smaller than a patch.
            NonFiniteError: an image has a NaN or infinite pixel.
        """
        data = Data.of(train, ids=ids, collate=None if task is None else task.collate)
        sums, lows, highs, pixels = [], [], [], 0
        for images in checked(data, self.shape, batch_size):
            if pixels == 0:
                self._require_larger(images)
            sums.append(images.double().sum((0, 2, 3)))
            lows.append(images.amin((0, 2, 3)))
            highs.append(images.amax((0, 2, 3)))
            pixels += images[:, 0].numel()
        centre = (torch.stack(sums).sum(0) / pixels).cpu()
        fitted = FittedNDA(self, task, data, centre, batch_size=batch_size, executor=executor)
        low, high = torch.stack(lows).amin(0).cpu(), torch.stack(highs).amax(0).cpu()
        fitted.warn_of_rounding((high - centre).maximum(centre - low))
        return fitted

    def restore(self, task: Task | None, train: Data, tensors: dict[str, Tensor]) -> "FittedNDA":
        """From the saved means of the channels."""
        return FittedNDA(self, task, train, tensors["centre"], batch_size=BATCH)

    def _require_larger(self, images: Tensor) -> None:
        """Refuse images that a patch does not fit into."""
        height, width = images.shape[2:]
        for _, window in self.windows:
            if window.side > min(height, width):
                raise DataError(
                    f"a patch of {window.side} pixels does not fit into images of {height} x "
                    f"{width}: choose a smaller patch, or scale='single'"
                )


class FittedNDA(Fitted):
    """The training images, and the mean of each channel `[c]`, which is taken off all pixels."""

    def __init__(
        self,
        method: NDA,
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
        """Hash of the task's model, or `"none"` without a task."""
        return "none" if self.task is None else self.task.model_hash()

    def pieces(self, queries: Data) -> Iterator[Piece]:
        """Scores of some queries for all training images."""
        for rows in self._chunks(queries):
            scores = torch.zeros((), dtype=self._dtype, device=self._device)
            for share, window in self.method.windows:
                scores = scores + share * self._weigh(queries, rows, window).scores
            yield rows, slice(0, len(self.train)), scores

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
        data, numbers, found, entropy = self._placed(queries, top, ids)
        return Maps(
            query_ids=data.ids,
            ids=self.train.ids[numbers.numpy()],
            values=torch.stack([query.here for query in found]).cpu(),
            entropy=entropy.cpu(),
        )

    def sources(self, queries: Any, top: int = 10, *, ids: Any = None) -> Sources:
        """Where in its `top` training images each query finds what it needs.

        With several timesteps, weights are averaged over them.

        Raises:
            TaskError: scores mix two scales, whose positions are not the same.
        """
        data, numbers, found, _ = self._placed(queries, top, ids)
        return Sources(
            query_ids=data.ids,
            ids=self.train.ids[numbers.numpy()],
            values=torch.stack([query.there for query in found]).cpu(),
            best=torch.stack([query.best for query in found]).cpu(),
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
        for rows in self._chunks(data):
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
                        self.method.keep,
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
        require_same_columns(self.train, data)
        for images in checked(data, self.method.shape, self.batch_size):
            if tuple(images.shape[1:]) != self._shape:
                raise DataError(
                    f"queries are images of shape {tuple(images.shape[1:])} and the training set's "
                    f"have {self._shape}: prepare both in the same way"
                )
        return data

    def _chunks(self, queries: Data) -> Iterator[slice]:
        """Queries at a time, so many that the weights of all training images fit in memory."""
        positions = max(_positions(self._shape, window) for _, window in self.method.windows)
        step = max(1, self._most_rows() // (positions * len(self.method.timesteps)))
        for start in track(range(0, len(queries), step), f"{self.method.name}, queries"):
            yield slice(start, min(start + step, len(queries)))

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
        levels, count, size = len(self.method.timesteps), rows.stop - rows.start, len(self.train)
        extent = [window.positions(pixels) for pixels in self._shape[1:]]
        scores = torch.zeros(count, size, dtype=self._dtype, device=self._device)
        normaliser = scores.new_zeros(levels, count, *extent, dtype=torch.double)
        entropy = torch.zeros_like(normaliser)
        for tile in tiles(parts, self._most_rows()):
            for part in weigh(
                tile, self._blocks, size, window, self.method.keep, entropies=entropies
            ):
                part.add_scores(scores, 1.0 / levels)
                normaliser.view(-1)[part.rows.place] = part.normaliser
                if entropies:
                    entropy.view(-1)[part.rows.place] = part.entropy()
        return _Weighed(parts, scores, normaliser, entropy)

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
