"""Low-rank curvature from products with vectors: Arnoldi iteration and the Nyström approximation.

Both give orthonormal vectors and eigenvalues. What they leave out counts with the damping alone,
unless it is dropped: most of the directions in which gradients differ are there.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from forebear.curvature.base import GradientStream
from forebear.curvature.damping import Damping
from forebear.curvature.operator import Kind, Operator, curvature_operator, random_vectors
from forebear.curvature.spectrum import Eigenpairs, FittedSpectrum, Rest, restored
from forebear.differentiation import Function
from forebear.errors import DataError, NumericalWarning
from forebear.gradients import Precision
from forebear.types import require_choices

NEGATIVE = 1e-6  # of the largest eigenvalue: below zero by more than rounding


@dataclass(frozen=True, kw_only=True)
class Arnoldi:
    """The largest eigenpairs that a Krylov space finds (Schioppa et al. 2022).

    The space is spanned by `v, Cv, C²v, …` for a random v, with each new vector made orthogonal to
    all before it twice. C is symmetric, so this is the Lanczos process, and the Hessenberg matrix
    is made symmetric before it is diagonalised.

    Attributes:
        kind: of curvature.
        rank: eigenpairs kept, by absolute value.
        krylov: dimension of the space, one product with C each.
        rest: directions outside are `"damped"` by λ alone, or `"drop"`ped as in the paper.
        precision: of the products of all pairs; `"bfloat16"` adds up in float32.
    """

    kind: Literal["hessian", "gauss_newton", "fisher"] = "gauss_newton"
    rank: int = 50
    krylov: int = 100
    rest: Rest = "damped"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        require_choices(self)
        if not 1 <= self.rank <= self.krylov:
            raise DataError(
                f"rank is {self.rank} and krylov is {self.krylov}: keep at least one eigenpair and "
                "at most as many as the space has dimensions"
            )

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> FittedSpectrum:
        """Build the Krylov space with one product after the other."""
        operator = _operator(self.kind, stream, function, seed, self.krylov)
        basis, hessenberg, last = krylov_space(operator, self.krylov, seed)
        values, turns = torch.linalg.eigh(0.5 * (hessenberg + hessenberg.T))
        order = values.abs().argsort(descending=True)[: self.rank]
        largest = values.abs().max().clamp_min(1e-300)
        residual = (last * turns[-1, order]).abs().max() / largest
        facts = {"krylov": len(basis), "ritz_residual": residual.item()}
        lowest = values.min().item()
        if lowest < -NEGATIVE * largest.item():
            facts["lowest_ritz_value"] = lowest
            warnings.warn(
                f"the curvature is indefinite: its smallest Ritz value is {lowest:.3g}, and the "
                "absolute values are used; curvature='gauss_newton' has none below zero",
                NumericalWarning,
                stacklevel=3,
            )
        vectors = turns[:, order].T.to(basis.dtype) @ basis  # [r, P]
        values = values[order].abs()
        # The trace of an indefinite matrix may cancel: never less than what was found.
        mean = max(abs(operator.mean_eigenvalue), values.sum().item() / operator.size)
        pairs = Eigenpairs(
            operator.plan,
            values.to(basis.dtype),
            vectors,
            mean,
            len(stream.data),
            complete=False,
            rest=self.rest,
            precision=self.precision,
            facts=facts,
        )
        return pairs.with_damping(damping)

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> FittedSpectrum:
        """From saved eigenpairs."""
        return _restored(self, stream, tensors)


@dataclass(frozen=True, kw_only=True)
class Nystrom:
    """`CΩ (ΩᵀCΩ)⁺ ΩᵀC` for random vectors Ω, all of whose products with C are formed at once.

    Never above C itself. The small shift that keeps the inner matrix positive is taken off the
    eigenvalues again, after Frangella, Tropp and Udell (2023).

    Attributes:
        kind: of curvature, without negative eigenvalues.
        rank: number of random vectors.
        rest: directions outside are `"damped"` by λ alone, or `"drop"`ped.
        precision: of the products of all pairs; `"bfloat16"` adds up in float32.
    """

    kind: Literal["gauss_newton", "fisher"] = "gauss_newton"
    rank: int = 100
    rest: Rest = "damped"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        require_choices(self)
        if self.rank < 1:
            raise DataError(f"rank of Nystrom is {self.rank}: it must be at least 1")

    def fit(
        self, stream: GradientStream, function: Function, damping: Damping, seed: int
    ) -> FittedSpectrum:
        """One product with C for all random vectors together."""
        operator = _operator(self.kind, stream, function, seed, self.rank)
        values, vectors = nystrom(operator, min(self.rank, operator.size), seed)
        pairs = Eigenpairs(
            operator.plan,
            values,
            vectors,
            max(operator.mean_eigenvalue, 0.0),
            len(stream.data),
            complete=False,
            rest=self.rest,
            precision=self.precision,
        )
        return pairs.with_damping(damping)

    def restore(
        self, stream: GradientStream, function: Function, tensors: dict[str, Tensor]
    ) -> FittedSpectrum:
        """From saved eigenpairs."""
        return _restored(self, stream, tensors)


def krylov_space(operator: Operator, steps: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis of the Krylov space of a random vector.

    Returns:
        basis `[k, P]`, Hessenberg matrix `[k, k]` in double precision, and the length of what the
        last product adds to the space. `k < steps` when the space is exhausted.
    """
    steps = min(steps, operator.size)
    start = random_vectors(1, operator.size, seed, operator.like)
    basis = start.new_empty(steps, operator.size)
    basis[0] = start[0] / start[0].norm()
    hessenberg = torch.zeros(steps, steps, dtype=torch.float64, device=start.device)
    length = hessenberg.new_zeros(())
    for j in range(steps):
        new = operator(basis[j : j + 1])[0]
        before = new.norm()
        known = basis[: j + 1]
        for _ in range(2):
            part = known @ new
            hessenberg[: j + 1, j] += part
            new = new - part @ known
        length = new.norm().double()
        if length <= 10 * torch.finfo(new.dtype).eps * before:
            return known.clone(), hessenberg[: j + 1, : j + 1], torch.zeros_like(length)
        if j + 1 < steps:
            hessenberg[j + 1, j] = length
            basis[j + 1] = new / length.to(new.dtype)
    return basis, hessenberg, length


def nystrom(operator: Operator, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[r]` and orthonormal eigenvectors `[r, P]` of the Nyström approximation."""
    drawn = random_vectors(rank, operator.size, seed, operator.like)
    omega = torch.linalg.qr(drawn.double().T).Q.T  # [k, P]
    image = operator(omega.to(drawn.dtype)).double()
    shift = torch.finfo(drawn.dtype).eps * image.norm().item()
    image = image + shift * omega
    inner = omega @ image.T
    inner = 0.5 * (inner + inner.T)
    # The pseudo-inverse root of ΩᵀCΩ, rather than Cholesky: it may be singular to rounding.
    small, turns = torch.linalg.eigh(inner)
    kept = small > 10 * torch.finfo(torch.float64).eps * small[-1].clamp_min(0)
    root = (turns[:, kept] / small[kept].sqrt()).T @ image  # [r, P] with rootᵀ root = Ĉ
    values, sides = torch.linalg.eigh(root @ root.T)
    positive = values > shift
    values, sides = values[positive].flip(0), sides[:, positive].flip(1)
    vectors = (sides / values.sqrt()).T @ root
    return (values - shift).to(drawn.dtype), vectors.to(drawn.dtype)


def _operator(
    kind: Kind, stream: GradientStream, function: Function, seed: int, products: int
) -> Operator:
    """C for so many products: with few of them, writing it out costs more than they do."""
    size = sum(block.size for block in stream.plan.blocks.values())
    few = 4 * products < size
    return curvature_operator(kind, stream, function, seed=seed, by_example=few)


def _restored(
    configuration: Any, stream: GradientStream, tensors: dict[str, Tensor]
) -> FittedSpectrum:
    return restored(
        stream.plan,
        tensors,
        len(stream.data),
        complete=False,
        rest=configuration.rest,
        precision=configuration.precision,
    )
