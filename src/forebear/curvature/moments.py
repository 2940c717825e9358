"""Second moments of a block's factors, accumulated over a stream."""

from dataclasses import dataclass

import torch
from scipy.linalg import get_blas_funcs
from torch import Tensor

from forebear.blocks import Block
from forebear.layers import Factors

GRAM_BLOCK = 256  # narrower blocks would waste more in small products than they save

MANY_ROWS = 1024


@dataclass
class FactorMoments:
    """Sums of `left leftᵀ` and `right rightᵀ` over examples and positions.

    A side is a matrix `[d, d]`, or its diagonal `[d]` for one-hot or very long sides. Positions
    whose left or right factor carries no gradient (padding) are left out, so that padding changes
    nothing.
    """

    left: Tensor
    right: Tensor
    positions: int = 0

    @classmethod
    def start(cls, block: Block, terms: list[Factors], longest: int) -> "FactorMoments":
        """Zeros of the right kind for a block's terms."""
        like = terms[0].right
        one_hot = any(not term.left.is_floating_point() for term in terms)
        rows, cols = block.rows, block.cols
        return cls(
            like.new_zeros((rows,) if one_hot or rows > longest else (rows, rows)),
            like.new_zeros((cols,) if cols > longest else (cols, cols)),
        )

    @classmethod
    def taken(cls, tensors: dict[str, Tensor], name: str) -> "FactorMoments":
        """Those of a block out of `tensors`, where they are no longer held then."""
        left, right = tensors.pop(f"{name}/left"), tensors.pop(f"{name}/right")
        return cls(left, right, int(tensors.pop(f"{name}/positions")))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The sums of a block, ready to be added to those of other examples."""
        positions = torch.tensor(self.positions)
        return {f"{name}/left": self.left, f"{name}/right": self.right} | {
            f"{name}/positions": positions
        }

    def add(self, terms: list[Factors]) -> None:
        """Add a batch."""
        for left, right in terms:
            if not left.is_floating_point():
                # The gradient is on the right: a position without it is padding.
                used = right.flatten(0, 1).any(1)
                index = left.flatten()[used]
                self.left.index_add_(0, index, torch.ones_like(index, dtype=self.left.dtype))
                add_gram(self.right, right.flatten(0, 1)[used])
                self.positions += int(used.sum())
                continue
            flat_left, flat_right = left.flatten(0, 1), right.flatten(0, 1)
            add_gram(self.left, flat_left)
            if left.shape[1] > 1:
                used = flat_left.any(1)
                flat_right = flat_right[used]
            add_gram(self.right, flat_right)
            self.positions += len(flat_right)


def eigenvectors(total: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues `[d]` and eigenvectors `[d, d]` of `total / count`; None for a diagonal.

    In the gradients' own precision: EK-FAC measures the eigenvalues again in this basis, and
    K-FAC's are damped far above the rounding of single precision.
    """
    if total.ndim == 1:
        return total / count, None
    if len(total) == 1:
        return total[0] / count, None
    values, vectors = torch.linalg.eigh(symmetric(total) / count)
    return values.clamp_min(0), vectors


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add `rowsᵀ rows` to the upper half of `[d, d]`, or its diagonal to `[d]`.

    What is below the diagonal is not formed, or only in part, which saves up to half of the
    products; `symmetric` fills it in at the end.
    """
    if total.ndim == 1:
        total += rows.square().sum(0)
        return
    if len(rows) >= MANY_ROWS and rows.device.type == "cpu" and rows.dtype == total.dtype:
        # The symmetric product of the BLAS, in place; in its column order the upper half of our
        # matrix is the lower one. For small batches its threads would be in the way of torch's.
        x, out = rows.contiguous().numpy().T, total.numpy().T
        (syrk,) = get_blas_funcs(("syrk",), (x,))
        syrk(1.0, x, beta=1.0, c=out, lower=1, overwrite_c=1)
        return
    for columns in _blocks(len(total)):
        total[columns, columns.start :].addmm_(rows[:, columns].T, rows[:, columns.start :])


def symmetric(upper: Tensor) -> Tensor:
    """`upper` with what is below the diagonal filled in from above it, in place."""
    for columns in _blocks(len(upper)):
        square = upper[columns, columns]
        square.copy_(square.triu() + square.triu(1).T)
        upper[columns.stop :, columns] = upper[columns, columns.stop :].T
    return upper


def _blocks(size: int) -> list[slice]:
    width = max(GRAM_BLOCK, -(-size // 8))
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]
