"""Patches of images, and softmax weights of training patches for query patches, block by block.

Symbols: a query patch `x` and a training patch `y` at a noise level with signal `s` and noise `σ`
have the logit `−|x − s y|² / 2σ²`. What belongs to `x` alone cancels in the softmax, so the logit
is computed as `(s/σ²) ⟨x, y⟩ − (s²/2σ²) |y|²`: a matrix product whose right factor knows nothing of
queries and noise levels.

A patch that the frame cuts off is compared only with patches that are cut off in the same way. That
is the limit of a constant written outside the frame as the constant grows, but without its numbers,
next to which float32 has no digits left for the pixels.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import threshold

PATCH_BYTES = 2**19
"""Training patches written out at a time; they and their logits stay in the cache."""

LOGIT_BYTES = 2**20
"""Logits at a time."""

NEGLIGIBLE = 1e-12
"""Weights of an image below this are not worth finding their largest terms."""

LARGEST = 1e20
"""Sums of exponentials above this are formed again from their true maximum."""


@dataclass(frozen=True)
class Window:
    """A square patch, compared pixel by pixel or by sums over blocks of pixels.

    Attributes:
        points: numbers on a side.
        ratio: pixels on a side of the block behind each number, which is their sum over `ratio`;
            so blocks are an orthonormal projection of the patch.
    """

    points: int
    ratio: int = 1

    @property
    def side(self) -> int:
        """Pixels on a side."""
        return self.points * self.ratio

    @property
    def padding(self) -> int:
        """Pixels by which a patch may stick out of the frame."""
        return (self.side - 1) // 2

    def positions(self, extent: int) -> int:
        """Places along an axis; one fewer than pixels where the side is even."""
        return extent + 2 * self.padding - self.side + 1


@dataclass(frozen=True)
class Group:
    """Positions whose patches are cut off in the same way, a rectangle of them.

    Attributes:
        rows: of the positions.
        columns: of the positions.
        tall: rows of the patch's points that the frame does not cut off whole.
        wide: columns of them.
    """

    rows: range
    columns: range
    tall: range
    wide: range

    @property
    def positions(self) -> int:
        """How many patches of an image are in the group."""
        return len(self.rows) * len(self.columns)


def groups(height: int, width: int, window: Window) -> list[Group]:
    """All positions of an image by the way its frame cuts their patches off."""
    return [
        Group(rows, columns, tall, wide)
        for rows, tall in _runs(height, window)
        for columns, wide in _runs(width, window)
    ]


def _runs(extent: int, window: Window) -> list[tuple[range, range]]:
    """Positions along an axis with the same cut, and the points that are left of the patch."""

    def cut(position: int) -> tuple[int, int]:
        before = max(0, window.padding - position)
        after = max(0, position - window.padding + window.side - extent)
        return before, after

    runs = []
    for (before, after), same in groupby(range(window.positions(extent)), cut):
        positions = list(same)
        points = range(before // window.ratio, -(-(window.side - after) // window.ratio))
        runs.append((range(positions[0], positions[-1] + 1), points))
    return runs


def canvas(images: Tensor, window: Window) -> Tensor:
    """Images `[n, c, h, w]` with zeros around them, summed over blocks, as `[c, h', w', n]`.

    Images come last, so that patches are cut out in long runs.
    """
    n, c, h, w = images.shape
    pad = window.padding
    padded = images.new_zeros(c, h + 2 * pad, w + 2 * pad, n)
    padded[:, pad : pad + h, pad : pad + w] = images.permute(1, 2, 3, 0)
    if window.ratio == 1:
        return padded
    rows = padded.shape[1] - window.ratio + 1
    columns = padded.shape[2] - window.ratio + 1
    tall = sum((padded[:, i : i + rows] for i in range(1, window.ratio)), padded[:, :rows])
    both = sum((tall[:, :, j : j + columns] for j in range(1, window.ratio)), tall[:, :, :columns])
    return (both / window.ratio).contiguous()


def patches(painted: Tensor, group: Group, window: Window, extra: int = 0) -> Tensor:
    """The patches of a group, `[d + extra, v, n]`, from a canvas; extra rows are left empty."""
    c, _, _, n = painted.shape
    size = (c, len(group.tall), len(group.wide), len(group.rows), len(group.columns), n)
    channel, row, column, image = painted.stride()
    first = painted[
        :,
        group.rows.start + group.tall.start * window.ratio :,
        group.columns.start + group.wide.start * window.ratio :,
    ]
    view = first.as_strided(
        size, (channel, window.ratio * row, window.ratio * column, row, column, image)
    )
    d = c * len(group.tall) * len(group.wide)
    written = painted.new_empty(d + extra, group.positions, n)
    written[:d].view(size).copy_(view)
    return written


def training_patches(painted: Tensor, group: Group, window: Window) -> Tensor:
    """Patches of a group with what their logits need: `[y, |y|², 1]`, `[d + 2, v, n]`."""
    written = patches(painted, group, window, extra=2)
    torch.linalg.vecdot(written[:-2], written[:-2], dim=0, out=written[-2])
    written[-1] = 1.0
    return written


@dataclass(frozen=True)
class Rows:
    """Query positions of one group.

    Attributes:
        group: what training patches they are compared with.
        coefficients: `[r, d + 2]`, by which training patches are multiplied: `(s/σ²) x`,
            `−s²/2σ²`, and the place of a number to be taken off all logits.
        owner: `[r]` numbers of the queries.
        place: `[r]` where each stands among all positions of all noise levels and queries.
    """

    group: Group
    coefficients: Tensor
    owner: Tensor
    place: Tensor

    def __len__(self) -> int:
        return len(self.owner)

    def part(self, rows: slice) -> "Rows":
        """Some of them."""
        return Rows(self.group, self.coefficients[rows], self.owner[rows], self.place[rows])


def query_rows(scaled: Tensor, factors: Tensor, queries: int, window: Window) -> list[Rows]:
    """Query positions of every group.

    Args:
        scaled: `[t · q, c, h, w]`, noisy queries times `s/σ²`, noise level by noise level.
        factors: `[t · q]`, `−s²/2σ²` of each.
        queries: how many, q.
        window: the patch.
    """
    painted = canvas(scaled, window)
    copies, _, height, width = scaled.shape
    tall, wide = window.positions(height), window.positions(width)
    places = torch.arange(tall * wide, device=scaled.device).view(tall, wide)
    numbers = torch.arange(copies, device=scaled.device)
    found = []
    for group in groups(height, width, window):
        values = patches(painted, group, window)  # [d, v, t · q]
        d, v, _ = values.shape
        coefficients = scaled.new_zeros(copies, v, d + 2)
        coefficients[..., :d] = values.permute(2, 1, 0)
        coefficients[..., d] = factors[:, None]
        inside = places[group.rows.start : group.rows.stop]
        inside = inside[:, group.columns.start : group.columns.stop].reshape(-1)
        found.append(
            Rows(
                group,
                coefficients.view(copies * v, d + 2),
                (numbers % queries).repeat_interleave(v),
                (numbers[:, None] * (tall * wide) + inside).view(-1),
            )
        )
    return found


def tiles(parts: Iterable[Rows], most: int) -> Iterator[list[Rows]]:
    """The same rows in order, at most so many at a time."""
    tile: list[Rows] = []
    left = most
    for part in parts:
        start = 0
        while start < len(part):
            tile.append(part.part(slice(start, start + left)))
            start += len(tile[-1])
            left -= len(tile[-1])
            if left == 0:
                yield tile
                tile, left = [], most
    if tile:
        yield tile


class Weights:
    """Softmax weights of training images for query positions, gathered in one pass over images.

    Each block of images leaves sums of exponentials against a reference known at the time; the
    normaliser, known at the end, rescales them.

    Args:
        rows: query positions of a group.
        size: training images.
        window: the patch.
        keep: the weight of an image is the sum of its so many largest; of all when None.
        entropies: whether `entropy` will be asked for.
    """

    def __init__(
        self,
        rows: Rows,
        size: int,
        window: Window,
        keep: int | None,
        *,
        entropies: bool = False,
    ) -> None:
        self.rows = rows
        self.window = window
        self.keep = None if keep is None or keep >= rows.group.positions else keep
        self.coefficients = rows.coefficients.clone()
        self.normaliser = rows.coefficients.new_full((len(rows),), -torch.inf, dtype=torch.double)
        """`[r]`, the logarithm of the sum of exponentials over all patches so far."""
        self.entropies = entropies
        self._least = 0.95 * math.log(torch.finfo(rows.coefficients.dtype).tiny)
        self._sums = rows.coefficients.new_empty(len(rows), size)
        self._columns: list[slice] = []
        # What is known of each block: reference, sum and disorder, `[3, r, blocks]`. One tensor,
        # since many small ones between large ones that come and go break memory into pieces.
        self._facts = self.normaliser.new_zeros(3, len(rows), 16)

    def add(self, painted: Tensor, first: int) -> None:
        """Take in a block of images, as a canvas, the first of which has this number."""
        count = painted.shape[-1]
        self._columns.append(slice(first, first + count))
        if len(self._columns) > self._facts.shape[2]:
            self._facts = torch.cat([self._facts, torch.zeros_like(self._facts)], 2)
        numbers = self.coefficients.shape[1] * self.rows.group.positions
        step = max(1, PATCH_BYTES // (numbers * painted.element_size()))
        for start in range(0, count, step):
            some = slice(start, min(start + step, count))
            trained = training_patches(painted[..., some], self.rows.group, self.window)
            columns = slice(first + some.start, first + some.stop)
            high = max(1, LOGIT_BYTES // (trained[0].numel() * trained.element_size()))
            for top in range(0, len(self.rows), high):
                self._add(slice(top, min(top + high, len(self.rows))), columns, trained)
        self._facts[0, :, len(self._columns) - 1] = -self.coefficients[:, -1].double()
        # The next block is taken against what is known now, which saves looking for its maximum.
        self.coefficients[:, -1] = -self.normaliser.to(self.coefficients.dtype)

    def _add(self, rows: slice, columns: slice, trained: Tensor) -> None:
        before = self.normaliser[rows]
        if before[0] == -torch.inf:
            exponentials, full, total = self._exponentials(rows, trained, at_least=before)
        else:
            exponentials, full, total = self._exponentials(rows, trained)
        if not (total < LARGEST).all():
            old = -self.coefficients[rows, -1].double()
            exponentials, full, total = self._exponentials(rows, trained, at_least=old)
            self._rescale(rows, columns.start, old + self.coefficients[rows, -1].double())
        reference = -self.coefficients[rows, -1].double()
        after = torch.logaddexp(before, reference + total.log())
        sums = full
        if self.keep is not None:
            sums = _largest(exponentials, full, (reference - after).exp(), self.keep)
        self._sums[rows, columns] = sums
        facts = self._facts[:, rows, len(self._columns) - 1]
        facts[1] += total
        if self.entropies:
            facts[2] += torch.xlogy(full, full).sum(1, dtype=torch.double)
        self.normaliser[rows] = after

    def _rescale(self, rows: slice, stop: int, shift: Tensor) -> None:
        """Multiply what the block has so far by `exp(shift)` `[r]`, for another reference."""
        factor = shift.exp()
        so_far = slice(self._columns[-1].start, stop)
        self._sums[rows, so_far] *= factor.to(self._sums.dtype)[:, None]
        facts = self._facts[:, rows, len(self._columns) - 1]
        facts[2] = factor * (facts[2] + shift * facts[1])
        facts[1] *= factor

    def _exponentials(
        self, rows: slice, trained: Tensor, *, at_least: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Exponentials `[r, v, b]` with their sums over positions `[r, b]`, and over all `[r]`.

        They are taken against the reference in the coefficients, or where that is unknown or too
        low, against the maximum, but `at_least` so much, which is put there.
        """
        coefficients = self.coefficients[rows]
        if at_least is not None:
            coefficients[:, -1] = 0.0
        logits = coefficients @ trained.flatten(1)
        if at_least is not None:
            peak = logits.amax(1).maximum(at_least.to(logits.dtype))
            coefficients[:, -1] = -peak
            logits -= peak[:, None]
        # Exponentials that underflow take ten times as long: they stop at a floor, which is zero
        # again in the sums.
        found = logits.clamp_min_(self._least).exp_().view(-1, *trained.shape[1:])
        floor = 2.0 * math.exp(self._least) * found.shape[1]
        full = threshold(found.sum(1), floor, 0.0)
        return found, full, full.sum(1, dtype=torch.double)

    def add_scores(self, scores: Tensor, share: float) -> None:
        """Add `share` of each image's weights to `scores` `[q, n]`, in the row of their query."""
        references = self._facts[0, :, : len(self._columns)]
        factors = (share * (references - self.normaliser[:, None]).exp()).to(scores.dtype)
        owned = scores.new_zeros(len(scores), len(self.rows))
        numbers = torch.arange(len(self.rows), device=scores.device)
        for block, columns in enumerate(self._columns):
            owned[self.rows.owner, numbers] = factors[:, block]
            scores[:, columns] += owned @ self._sums[:, columns]

    def entropy(self) -> Tensor:
        """Entropy of the weights of images at each position, in nats, `[r]`."""
        reference, total, disorder = self._facts[:, :, : len(self._columns)]
        shift = reference - self.normaliser[:, None]
        return -(shift.exp() * (disorder + shift * total)).sum(1).clamp_max(0.0)


def _largest(exponentials: Tensor, full: Tensor, scale: Tensor, keep: int) -> Tensor:
    """Sums over the `keep` largest of axis 1 of `[r, v, b]`, where that makes a difference."""
    matters = full * scale.to(full.dtype)[:, None] > NEGLIGIBLE
    row, image = matters.nonzero(as_tuple=True)
    sums = full.clone()
    sums[row, image] = kept_sum(exponentials[row, :, image], keep)
    return sums


def kept_sum(values: Tensor, keep: int | None) -> Tensor:
    """Sum over the last axis of all, or of the `keep` largest."""
    if keep is None or keep >= values.shape[-1]:
        return values.sum(-1)
    return values.topk(keep, dim=-1, sorted=False).values.sum(-1)


def weigh(
    tile: list[Rows],
    blocks: Callable[[], Iterator[tuple[slice, Tensor]]],
    size: int,
    window: Window,
    keep: int | None,
    *,
    entropies: bool = False,
) -> list[Weights]:
    """Weights of all training images for some query positions, in one pass over the images."""
    weights = [Weights(rows, size, window, keep, entropies=entropies) for rows in tile]
    for columns, images in blocks():
        painted = canvas(images, window)
        for part in weights:
            part.add(painted, columns.start)
    return weights
