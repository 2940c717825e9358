"""TensorSketch: a count sketch of a gradient that is never written out.

Hashing entry (i, j) of `left ⊗ right` to `h(i) + h'(j) mod k` with sign `s(i) s'(j)` makes the
sketch of an outer product the circular convolution of the sketches of its factors (Pham & Pagh
2013). In the frequency domain that is an elementwise product, sums over positions and blocks are
sums, and inner products are kept (Parseval), so no inverse transform is needed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forebear.blocks import Block, Plan
from forebear.capture import Gradients
from forebear.gradients import WORKSPACE, materialise, rows_of
from forebear.layers import Factors


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
class BlockHash:
    """Buckets and signs of a block's rows and columns."""

    block: Block
    rows: Tensor  # [rows] bucket
    row_signs: Tensor  # [rows] ±1
    cols: Tensor  # [cols]
    col_signs: Tensor

    @classmethod
    def draw(cls, block: Block, dimension: int, generator: torch.Generator) -> "BlockHash":
        """Independent hashes; sizes below the dimension get distinct buckets."""

        def side(size: int) -> tuple[Tensor, Tensor]:
            if size <= dimension:
                # Without collisions a side is sketched exactly; the pair still spreads.
                bucket = torch.randperm(dimension, generator=generator)[:size]
            else:
                bucket = torch.randint(dimension, (size,), generator=generator)
            return bucket, torch.randint(2, (size,), generator=generator) * 2 - 1

        rows, row_signs = side(block.rows)
        cols, col_signs = side(block.cols)
        return cls(block, rows, row_signs, cols, col_signs)


@dataclass(frozen=True)
class PreparedTensorSketch:
    """Drawn hashes."""

    dimension: int
    hashes: dict[str, BlockHash]

    def features(self, gradients: Gradients) -> Tensor:
        """Projected gradients, `[b, dimension]`, in an orthonormal real frequency basis."""
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
        left = torch.fft.rfft(self._sketch(term.left, hashed.rows, hashed.row_signs))
        if hashed.block.cols == 1:
            return left.sum(1)  # the right factor is one: a shift would change no inner product
        right = torch.fft.rfft(self._sketch(term.right, hashed.cols, hashed.col_signs))
        return left.mul_(right).sum(1) if left.shape[1] > 1 else left.mul_(right)[:, 0]

    def _sketch(self, factor: Tensor, buckets: Tensor, signs: Tensor) -> Tensor:
        """Count sketch of the last axis, `[b, t, k]`."""
        out = factor.new_zeros(*factor.shape[:2], self.dimension)
        return out.index_add_(2, buckets.to(factor.device), factor * signs.to(factor))

    def _scattered(self, term: Factors, hashed: BlockHash) -> Tensor:
        """The same sketch entry by entry, `[b, k]`."""
        left, right = term
        size = len(right)
        out = right.new_zeros(size, self.dimension)
        if not left.is_floating_point():
            rows, row_signs = hashed.rows.to(left.device), hashed.row_signs.to(right)
            bucket = (rows[left][:, :, None] + hashed.cols.to(left.device)) % self.dimension
            value = right * row_signs[left][:, :, None] * hashed.col_signs.to(right)
            return out.scatter_add_(1, bucket.flatten(1), value.flatten(1))
        bucket = (hashed.rows[:, None] + hashed.cols).flatten() % self.dimension
        signs = (hashed.row_signs[:, None] * hashed.col_signs).flatten().to(right)
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
    middle = spectrum[:, 1:half]
    ends = torch.stack([spectrum[:, 0].real, spectrum[:, half].real], 1)
    rest = torch.view_as_real(middle.contiguous()).flatten(1).mul_(2**0.5)
    return torch.cat([ends, rest], 1).div_(dimension**0.5)
