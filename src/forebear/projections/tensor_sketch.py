"""TensorSketch: a count sketch of a gradient that is never written out.

Hashing entry (i, j) of `left ⊗ right` to `h(i) + h'(j) mod k` with sign `s(i) s'(j)` makes the
sketch of an outer product the circular convolution of the sketches of its factors (Pham & Pagh
2013). In the frequency domain that is an elementwise product, sums over positions and blocks are
sums, and inner products are kept (Parseval), so no inverse transform is needed.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from forebear.blocks import Block, Plan
from forebear.capture import Gradients
from forebear.gradients import WORKSPACE, materialise, positions_of, rows_of
from forebear.layers import Factors

NARROW = 64
"""Sides up to this size are transformed by a product with the few columns they touch."""

CACHED = 2**19
"""Entries of the spectra worked on at a time: a few of them stay in a core's cache."""


@dataclass(frozen=True)
class TensorSketch:
    """A sparse projection that acts on factors; `dimension` must be even."""

    dimension: int = 2048

    def prepare(self, plan: Plan, seed: int) -> "PreparedTensorSketch":
        """Draw the hashes of every block."""
        generator = torch.Generator().manual_seed(seed)
        hashes = {
            name: BlockHash.draw(block, self.dimension, generator)
            for name, block in plan.blocks.items()
        }
        return PreparedTensorSketch(self.dimension, hashes)


@dataclass(frozen=True)
class SideHash:
    """Buckets `[size]` and signs `[size]` (±1) of one side of a block."""

    buckets: Tensor
    signs: Tensor
    dimension: int

    @classmethod
    def draw(cls, size: int, dimension: int, generator: torch.Generator, *, spread: bool) -> Self:
        """Random signs, and random buckets when `spread`.

        Two entries of an outer product meet where the differences of their buckets agree, so it is
        enough that one side is spread; the other lies in order and needs no scattering. Sizes up to
        the dimension get distinct buckets: the side itself is then sketched without collisions.
        """
        if size > dimension:
            buckets = torch.randint(dimension, (size,), generator=generator)
        elif spread:
            buckets = torch.randperm(dimension, generator=generator)[:size]
        else:
            buckets = torch.arange(size)
        return cls(buckets, torch.randint(2, (size,), generator=generator) * 2 - 1, dimension)

    @cached_property
    def in_order(self) -> bool:
        """Whether bucket i belongs to entry i."""
        return bool((self.buckets == torch.arange(len(self.buckets))).all())

    def spectrum(self, factor: Tensor) -> Tensor:
        """Real Fourier transform of the count sketch of the last axis, `[b, t, k // 2 + 1]`."""
        if len(self.buckets) <= NARROW:
            waves = factor @ self._waves.to(factor)
            return torch.view_as_complex(waves.unflatten(-1, (-1, 2)))
        signed = factor * self.signs.to(factor)
        if self.in_order:
            return torch.fft.rfft(signed, n=self.dimension)
        sketch = factor.new_zeros(*factor.shape[:2], self.dimension)
        return torch.fft.rfft(sketch.index_add_(2, self.buckets.to(factor.device), signed))

    @cached_property
    def _waves(self) -> Tensor:
        """The transform of each entry's bucket, real and imaginary parts in turn, `[size, k + 2]`.

        The angle is reduced as an integer, so that single precision loses nothing.
        """
        frequency = torch.arange(self.dimension // 2 + 1)
        turns = (self.buckets[:, None] * frequency % self.dimension).double() / self.dimension
        angle = -2 * torch.pi * turns
        waves = torch.stack([angle.cos(), angle.sin()], -1) * self.signs[:, None, None]
        return waves.flatten(1)


@dataclass(frozen=True)
class BlockHash:
    """Buckets and signs of a block's rows and columns."""

    block: Block
    rows: SideHash
    cols: SideHash

    @classmethod
    def draw(cls, block: Block, dimension: int, generator: torch.Generator) -> Self:
        """Independent hashes; the narrower side is the one that is spread."""
        narrow = block.rows <= block.cols or block.cols == 1
        return cls(
            block,
            SideHash.draw(block.rows, dimension, generator, spread=narrow),
            SideHash.draw(block.cols, dimension, generator, spread=not narrow),
        )


@dataclass(frozen=True)
class PreparedTensorSketch:
    """Drawn hashes."""

    dimension: int
    hashes: dict[str, BlockHash]

    @property
    def sizes(self) -> dict[str, int]:
        """One part."""
        return {"projected": self.dimension}

    def features(self, gradients: Gradients) -> Tensor:
        """Projected gradients, `[b, dimension]`, in an orthonormal real frequency basis."""
        (first, *_), *_ = gradients.values()
        longest = max(positions_of(terms) for terms in gradients.values())
        step = max(16, CACHED // (self.dimension * max(1, longest)))
        parts = []
        for start in range(0, len(first.right), step):
            rows = slice(start, start + step)
            few = {name: rows_of(terms, rows) for name, terms in gradients.items()}
            parts.append(self._features(few))
        return torch.cat(parts)

    def _features(self, gradients: Gradients) -> Tensor:
        spectrum: Tensor | None = None
        time: Tensor | None = None
        for name, hashed in self.hashes.items():
            for term in gradients[name]:
                if _convolves(term, hashed.block):
                    part = self._convolved(term, hashed)
                    spectrum = part if spectrum is None else spectrum.add_(part)
                else:
                    part = self._scattered(term, hashed)
                    time = part if time is None else time.add_(part)
        if time is not None:
            part = torch.fft.rfft(time)
            spectrum = part if spectrum is None else spectrum.add_(part)
        assert spectrum is not None
        return _real(spectrum, self.dimension)

    def _convolved(self, term: Factors, hashed: BlockHash) -> Tensor:
        """Spectrum of a term from the spectra of its factors, `[b, k // 2 + 1]`."""
        left = hashed.rows.spectrum(term.left)
        if hashed.block.cols == 1:
            return left.sum(1)  # the right factor is one: a shift would change no inner product
        right = hashed.cols.spectrum(term.right)
        return left.mul_(right).sum(1) if left.shape[1] > 1 else left.mul_(right)[:, 0]

    def _scattered(self, term: Factors, hashed: BlockHash) -> Tensor:
        """The same sketch entry by entry, `[b, k]`."""
        left, right = term
        size = len(right)
        out = right.new_zeros(size, self.dimension)
        if not left.is_floating_point():
            rows, row_signs = hashed.rows.buckets.to(left.device), hashed.rows.signs.to(right)
            cols = hashed.cols.buckets.to(left.device)
            bucket = (rows[left][:, :, None] + cols) % self.dimension
            value = right * row_signs[left][:, :, None] * hashed.cols.signs.to(right)
            return out.scatter_add_(1, bucket.flatten(1), value.flatten(1))
        bucket = (hashed.rows.buckets[:, None] + hashed.cols.buckets).flatten() % self.dimension
        signs = (hashed.rows.signs[:, None] * hashed.cols.signs).flatten().to(right)
        step = max(1, WORKSPACE // hashed.block.size)
        for start in range(0, size, step):
            rows = slice(start, start + step)
            written = materialise(rows_of([term], rows), hashed.block).flatten(1)
            out[rows].index_add_(1, bucket.to(right.device), written * signs)
        return out


def _convolves(term: Factors, block: Block) -> bool:
    """Whether transforming the factors is cheaper than hashing the written-out gradient."""
    if not term.left.is_floating_point():
        return False
    return term.left.shape[1] * 40_000 < block.size * 4 or term.left.shape[1] == 1


def _real(spectrum: Tensor, dimension: int) -> Tensor:
    """A real spectrum as `dimension` real numbers with the same inner products."""
    half = dimension // 2
    parts = torch.view_as_real(spectrum)
    out = parts.new_empty(len(spectrum), dimension)
    out[:, 0], out[:, 1] = parts[:, 0, 0], parts[:, half, 0]
    out[:, :2] *= dimension**-0.5
    # The other frequencies stand for their conjugates too.
    torch.mul(parts[:, 1:half], (2 / dimension) ** 0.5, out=out[:, 2:].unflatten(1, (-1, 2)))
    return out
