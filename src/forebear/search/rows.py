"""What search needs of rows, wherever they are, and rows that are in memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from forebear.data import require_finite
from forebear.errors import DataError, unknown_name
from forebear.store.manifest import SCALE_COLUMNS
from forebear.store.rows import decode

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class RowBlock(Protocol):
    """Consecutive rows as they are stored."""

    @property
    def rows(self) -> slice:
        """Which rows."""
        ...

    @property
    def values(self) -> Tensor:
        """`[b, d]` in the stored type."""
        ...

    @property
    def scales(self) -> Tensor | None:
        """What values are multiplied with: `[b]`, `[b, g]` for columns (int8), or None."""
        ...


class Rows(Protocol):
    """Rows that can be searched: a store on disk, or `ArrayRows`."""

    def __len__(self) -> int: ...

    @property
    def dimension(self) -> int:
        """Numbers in a row."""
        ...

    @property
    def norms(self) -> Tensor | np.ndarray:
        """`[n]` lengths of the rows, scales included, before or after they were rounded."""
        ...

    def blocks(self, rows_at_a_time: int) -> Iterator[RowBlock]:
        """All rows in order; blocks may be smaller than asked for."""
        ...

    def column(self, name: str) -> np.ndarray:
        """`[n]` what a column says of each row, such as its label."""
        ...


@dataclass(frozen=True)
class ArrayBlock:
    """A part of `ArrayRows`."""

    rows: slice
    values: Tensor
    scales: Tensor | None = None


@dataclass(frozen=True)
class ArrayRows:
    """Rows in memory.

    Attributes:
        values: `[n, d]` float32, float16, bfloat16 or int8.
        scales: `[n]`: a row is `values[i] * scales[i]`; or `[n, g]`, one for each 16 columns, as
            stores have them. int8 needs them.
        columns: what else is known of each row, by name, `[n]` each.

    Raises:
        DataError: shapes or types do not fit together, or there is no row.
        NonFiniteError: a row is NaN or infinite.
    """

    values: Tensor
    scales: Tensor | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or 0 in self.values.shape:
            raise DataError(f"rows have shape {tuple(self.values.shape)}: expected [n, d]")
        if self.values.dtype not in DTYPES:
            raise DataError(
                f"rows are {self.values.dtype}: convert them to float32, float16, bfloat16 or int8"
            )
        if self.scales is None and self.values.dtype == torch.int8:
            raise DataError("int8 rows need scales=, one a row")
        sized = [*self.columns.items(), *([] if self.scales is None else [("scales", self.scales)])]
        for name, column in sized:
            if len(column) != len(self.values):
                raise DataError(f"{name} has {len(column)} entries for {len(self.values)} rows")
        groups = -(-self.dimension // SCALE_COLUMNS)
        if self.scales is not None and self.scales.shape[1:] not in ((), (groups,)):
            raise DataError(
                f"scales have shape {tuple(self.scales.shape)}: give one a row, or {groups} for "
                f"{self.dimension} columns"
            )
        lengths = [
            torch.linalg.vector_norm(decode(block.values, block.scales), dim=1)
            for block in self.blocks(4096)
        ]
        require_finite(torch.cat(lengths)[:, None], "rows")
        object.__setattr__(self, "norms", torch.cat(lengths))

    norms: Tensor = field(init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def dimension(self) -> int:
        """Numbers in a row."""
        return self.values.shape[1]

    def blocks(self, rows_at_a_time: int) -> Iterator[ArrayBlock]:
        """All rows in order, as views."""
        for start in range(0, len(self), rows_at_a_time):
            rows = slice(start, min(start + rows_at_a_time, len(self)))
            yield ArrayBlock(
                rows, self.values[rows], None if self.scales is None else self.scales[rows]
            )

    def column(self, name: str) -> np.ndarray:
        """`[n]` what a column says of each row."""
        if name not in self.columns:
            raise unknown_name("column", name, self.columns)
        return np.asarray(self.columns[name])
