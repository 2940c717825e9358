"""How far one curvature is from another: pure functions of symmetric matrices.

The ladder of "Better Hessians Matter" (Hong et al. 2025): each step from the Hessian to K-FAC adds
an approximation, and these say how large it is.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebear.curvature.dense import FittedDense
from forebear.curvature.kronecker import FittedKronecker
from forebear.curvature.solved import Solved
from forebear.errors import DataError, NonFiniteError, TaskError


def relative_residual(matrix: Any, approximation: Any) -> float:
    """`‖C − Ĉ‖_F / ‖C‖_F`.

    Raises:
        DataError: the shapes differ, or C is zero.
    """
    matrix, approximation = _pair(matrix, approximation)
    return float(np.linalg.norm(matrix - approximation)) / _norm(matrix)


def off_block_energy(matrix: Any, sizes: Sequence[int]) -> float:
    """`‖C − blk(C)‖_F / ‖C‖_F`: what is lost with everything outside the diagonal blocks.

    Args:
        matrix: `[P, P]`.
        sizes: of the blocks, which add up to P.
    """
    matrix = _square(matrix, "matrix")
    return relative_residual(matrix, diagonal_blocks(matrix, sizes))


def diagonal_blocks(matrix: Any, sizes: Sequence[int]) -> np.ndarray:
    """`matrix` with everything outside its diagonal blocks set to zero, `[P, P]`.

    Raises:
        DataError: the sizes do not add up to P.
    """
    matrix = _square(matrix, "matrix")
    if sum(sizes) != len(matrix):
        raise DataError(f"blocks of {list(sizes)} add up to {sum(sizes)}, not to {len(matrix)}")
    kept = np.zeros_like(matrix)
    for where in _ranges(sizes):
        kept[where, where] = matrix[where, where]
    return kept


def eigenvalue_overlap(matrix: Any, approximation: Any) -> float:
    """`1 − ‖sort λ̂ − sort λ‖ / ‖λ‖`: one where the spectra agree, however the bases differ."""
    matrix, approximation = _pair(matrix, approximation)
    values, others = np.linalg.eigvalsh(matrix), np.linalg.eigvalsh(approximation)
    return 1.0 - float(np.linalg.norm(values - others)) / _norm(values)


def eigenbasis_overlap(matrix: Any, approximation: Any, k: int) -> float:
    """`‖V_kᵀ U_k‖_F² / k` of the k leading eigenvectors; k / P for unrelated bases.

    Raises:
        DataError: k is not between 1 and P.
    """
    matrix, approximation = _pair(matrix, approximation)
    if not 1 <= k <= len(matrix):
        raise DataError(f"k is {k}: the matrix has {len(matrix)} eigenvectors, choose 1 to that")
    one, other = (np.linalg.eigh(m)[1][:, -k:] for m in (matrix, approximation))
    return float(np.square(one.T @ other).sum()) / k


@dataclass(frozen=True)
class KroneckerError:
    """The squared error of K-FAC on a block-diagonal matrix G, in its two parts.

    EK-FAC is the orthogonal projection of G on the matrices that are diagonal in K-FAC's basis, so
    `‖G − K‖² = ‖G − E‖² + ‖E − K‖²` exactly.

    Attributes:
        total: `‖G − K‖²`.
        basis: `‖G − E‖²`, what no eigenvalues can repair.
        eigenvalues: `‖E − K‖²`, what better eigenvalues repair.
    """

    total: float
    basis: float
    eigenvalues: float

    @property
    def eigenvalue_share(self) -> float:
        """Share of K-FAC's error that is due to its eigenvalues; NaN where there is no error."""
        return self.eigenvalues / self.total if self.total else math.nan

    @property
    def defect(self) -> float:
        """How far the parts are from adding up, relative to the total: rounding, if all is well."""
        return abs(self.total - self.basis - self.eigenvalues) / (self.total or 1.0)


def kronecker_error(blocks: Any, corrected: Any, products: Any) -> KroneckerError:
    """K-FAC's error, apart by basis and eigenvalues.

    Args:
        blocks: `[P, P]` G, block-diagonal.
        corrected: `[P, P]` EK-FAC of the same factors.
        products: `[P, P]` K-FAC.
    """
    blocks, corrected = _pair(blocks, corrected)
    blocks, products = _pair(blocks, products)
    total, basis, eigenvalues = (
        float(np.square(difference).sum())
        for difference in (blocks - products, blocks - corrected, corrected - products)
    )
    return KroneckerError(total, basis, eigenvalues)


@dataclass(frozen=True)
class Spectrum:
    """What the eigenvalues say about inverting a matrix.

    Attributes:
        smallest: eigenvalue.
        largest: eigenvalue.
        negative: how many are below zero by more than rounding.
        tiny: how many are within `cutoff` times the largest of zero.
        condition: largest over smallest absolute eigenvalue, after damping.
    """

    smallest: float
    largest: float
    negative: int
    tiny: int
    condition: float


def spectrum(matrix: Any, damping: float = 0.0, cutoff: float = 1e-6) -> Spectrum:
    """Extremes, signs and condition number of a symmetric matrix.

    Args:
        matrix: `[P, P]`.
        damping: added to every eigenvalue for the condition number only.
        cutoff: relative to the largest absolute eigenvalue.
    """
    values = np.linalg.eigvalsh(_square(matrix, "matrix"))
    scale = float(np.abs(values).max())
    rounding = len(values) * np.finfo(np.float64).eps * scale
    damped = np.abs(values + damping)
    return Spectrum(
        smallest=float(values[0]),
        largest=float(values[-1]),
        negative=int((values < -rounding).sum()),
        tiny=int((np.abs(values) <= cutoff * scale).sum()),
        condition=float(damped.max() / damped.min()) if damped.min() > 0 else math.inf,
    )


def matrix_of(fitted: Any) -> np.ndarray:
    """The matrix C of a fitted curvature, without damping, written out in float64, `[P, P]`.

    For small models: K-FAC's and EK-FAC's blocks are multiplied out, a dense curvature is taken
    with the eigenvalues that its inverse uses, any other is the inverse of its solutions.

    Raises:
        TaskError: the curvature has no solution for written-out vectors.
    """
    if isinstance(fitted, FittedKronecker):
        return joined_blocks(kronecker_blocks(fitted).values())
    if isinstance(fitted, FittedDense) and fitted.factor is not None:
        factor = fitted.factor.double()
        matrix = factor @ factor.T
        matrix.diagonal().sub_(fitted.damping)
        return matrix.numpy()
    if not isinstance(fitted, Solved):
        raise TaskError(f"{type(fitted).__name__} does not solve for written-out vectors")
    curvature: Any = fitted
    size = sum(block.size for block in curvature.plan.blocks.values())
    inverse = curvature.solve(torch.eye(size, dtype=torch.float64)).double().numpy()
    used = set(curvature.details()["damping_used"].values())
    if len(used) > 1:
        raise TaskError("the blocks are damped differently: use damping=fb.Absolute(...)")
    return np.linalg.inv(inverse) - used.pop() * np.eye(size)


def kronecker_blocks(fitted: FittedKronecker) -> dict[str, np.ndarray]:
    """`Q diag(Λ) Qᵀ` of each block with `Q = Q_L ⊗ Q_R`, `[rows · cols, rows · cols]`."""
    found = {}
    for name, block in fitted.blocks.items():
        basis, values = block.basis, block.eigenvalues.double()
        vectors = torch.kron(
            _vectors(basis.left_vectors, basis.block.rows),
            _vectors(basis.right_vectors, basis.block.cols),
        )
        found[name] = ((vectors * values.flatten()) @ vectors.T).numpy()
    return found


def joined_blocks(blocks: Mapping[str, Any] | Iterable[Any]) -> np.ndarray:
    """Blocks along the diagonal of one matrix, `[P, P]`."""
    each = blocks.values() if isinstance(blocks, Mapping) else blocks
    squares = [_square(block, "block") for block in each]
    sizes = [len(block) for block in squares]
    whole = np.zeros((sum(sizes), sum(sizes)))
    for where, block in zip(_ranges(sizes), squares, strict=True):
        whole[where, where] = block
    return whole


def _vectors(vectors: Tensor | None, size: int) -> Tensor:
    if vectors is None:
        return torch.eye(size, dtype=torch.float64)
    return vectors.double().contiguous()


def _ranges(sizes: Sequence[int]) -> list[slice]:
    ends = np.cumsum(sizes)
    return [slice(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]


def _pair(one: Any, other: Any) -> tuple[np.ndarray, np.ndarray]:
    one, other = _square(one, "matrix"), _square(other, "approximation")
    if one.shape != other.shape:
        raise DataError(f"the matrices have shapes {one.shape} and {other.shape}: they must agree")
    return one, other


def _square(matrix: Any, what: str) -> np.ndarray:
    plain = matrix.detach().cpu() if isinstance(matrix, Tensor) else matrix
    array = np.asarray(plain, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not len(array):
        raise DataError(f"{what} has shape {array.shape}: it must be square")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{what} has entries that are NaN or infinite")
    return array


def _norm(values: np.ndarray) -> float:
    norm = float(np.linalg.norm(values))
    if norm == 0:
        raise DataError("the matrix is zero: nothing can be said relative to it")
    return norm
