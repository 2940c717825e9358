"""A sparse Johnson-Lindenstrauss transform: each entry of a gradient goes to a few buckets."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from forebear.blocks import Plan
from forebear.capture import Gradients
from forebear.errors import DataError
from forebear.gradients import WORKSPACE, materialise, rows_of


@dataclass(frozen=True)
class SJLT:
    """`sparsity` entries `±1 / √sparsity` a column, one in each of as many parts of the result.

    The block construction of Kane & Nelson (2014). Gradients are written out, some examples at a
    time, so the cost is `sparsity` × P for each example however long the result is.

    Attributes:
        dimension: length of the result, a multiple of `sparsity`.
        sparsity: entries that each parameter is added to.
    """

    dimension: int = 2048
    sparsity: int = 2

    def __post_init__(self) -> None:
        if self.sparsity < 1 or self.dimension < 1 or self.dimension % self.sparsity:
            raise DataError(
                f"dimension {self.dimension} and sparsity {self.sparsity} do not fit: the "
                "dimension must be a multiple of the sparsity"
            )

    def prepare(self, plan: Plan, seed: int) -> "PreparedSJLT":
        """Draw buckets and signs of every parameter."""
        generator = torch.Generator().manual_seed(seed)
        part = self.dimension // self.sparsity
        offsets = torch.arange(self.sparsity)[:, None] * part
        matrices = {}
        for name, block in plan.blocks.items():
            shape = (self.sparsity, block.size)
            buckets = torch.randint(part, shape, generator=generator) + offsets
            signs = torch.randint(2, shape, generator=generator) * 2.0 - 1.0
            matrices[name] = _sparse(buckets, signs, self.dimension)
        return PreparedSJLT(self.dimension, self.sparsity, plan, matrices)


@dataclass(frozen=True)
class PreparedSJLT:
    """Sparse matrices `[dimension, P_l]` of signs by block, to be divided by `√sparsity`."""

    dimension: int
    sparsity: int
    plan: Plan
    matrices: dict[str, Tensor]

    @property
    def sizes(self) -> dict[str, int]:
        """One part."""
        return {"projected": self.dimension}

    def features(self, gradients: Gradients) -> Tensor:
        """Projected gradients, `[b, dimension]`."""
        like = next(iter(gradients.values()))[0].right
        out = like.new_zeros(self.dimension, len(like))  # rows of it are what buckets add up
        for name, block in self.plan.blocks.items():
            matrix = self.matrices[name].to(like)
            step = max(1, WORKSPACE // block.size)
            for start in range(0, len(like), step):
                rows = slice(start, start + step)
                written = materialise(rows_of(gradients[name], rows), block).flatten(1)
                out[:, rows] += matrix @ written.T
        return (out.T / self.sparsity**0.5).contiguous()


def _sparse(buckets: Tensor, signs: Tensor, dimension: int) -> Tensor:
    """Entries at (bucket, parameter) in the compressed form of products, `[dimension, P_l]`."""
    columns = torch.arange(buckets.shape[1]).expand_as(buckets)
    where = torch.stack([buckets.flatten(), columns.flatten()])
    size = (dimension, buckets.shape[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        entries = torch.sparse_coo_tensor(where, signs.flatten(), size, check_invariants=False)
        return entries.to_sparse_csr()
