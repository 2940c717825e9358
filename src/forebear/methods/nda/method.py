"""The method: its configuration."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from forebear.data import Data
from forebear.errors import DataError, TaskError, unknown_name
from forebear.executors import Executor
from forebear.methods.nda.fitted import FLOATS, FittedNDA
from forebear.methods.nda.images import checked
from forebear.methods.nda.patches import Window
from forebear.stream import BATCH
from forebear.task import Task
from forebear.tasks.schedules import Discrete, Level, Schedule
from forebear.types import require_choices

PUBLISHED = 100
"""Weights of an image that are kept at a position, in the authors' scripts."""


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
            `"published"` are 100, or all where there are fewer.
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
    keep: int | Literal["published"] | None = "published"
    schedule: Schedule | None = None
    shape: tuple[int, int, int] | None = None
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("patch", "ratio"):
            if not isinstance(getattr(self, name), int):
                raise TaskError(f"{name} is {getattr(self, name)!r}: it must be a whole number")
        if self.patch < 1 or (self.patch % 2 == 0 and self.scale != "downscaled"):
            raise TaskError(
                f"patch is {self.patch}: a patch has a middle pixel, so its side must be odd; even "
                "ones are for scale='downscaled'"
            )
        if self.scale != "single" and self.ratio < 2:
            raise TaskError(f"ratio is {self.ratio}: blocks must have at least 2 pixels on a side")
        if not 0 <= self.alpha <= 1:
            raise TaskError(f"alpha is {self.alpha}: it is a share, from 0 to 1")
        if isinstance(self.keep, str) and self.keep != "published":
            raise unknown_name("keep of NDA", self.keep, ("published",))
        if not isinstance(self.keep, int | str | None):
            raise TaskError(f"keep is {self.keep!r}: it is a whole number, 'published' or None")
        if isinstance(self.keep, int) and self.keep < 1:
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
            executor: where scores are worked out later, by positions of queries; images are looked
                at, and maps made, in this process.

        Raises:
            DataError: images are integers, not scaled, or smaller than a patch, or have fewer
                positions than `keep`.
            NonFiniteError: an image has a NaN or infinite pixel.
        """
        data = Data.of(train, ids=ids, collate=None if task is None else task.collate)
        sums, lows, highs, pixels = [], [], [], 0
        for images in checked(data, self.shape, batch_size):
            if pixels == 0:
                self._require_large(images)
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

    @property
    def most(self) -> int | None:
        """How many weights of an image are kept at a position; None keeps all."""
        return PUBLISHED if self.keep == "published" else self.keep

    def _require_large(self, images: Tensor) -> None:
        """Refuse images that a patch does not fit into, or that have too few positions."""
        height, width = images.shape[2:]
        for _, window in self.windows:
            if window.side > min(height, width):
                raise DataError(
                    f"a patch of {window.side} pixels does not fit into images of {height} x "
                    f"{width}: choose a smaller patch, or scale='single'"
                )
            places = window.positions(height) * window.positions(width)
            if isinstance(self.keep, int) and self.keep > places:
                raise DataError(
                    f"keep is {self.keep} and images of {height} x {width} have {places} positions "
                    "of a patch: keep fewer weights, or all with keep=None"
                )
