"""Cheap products with a proved bound on their error, and exact ones for the few that matter.

A product in bfloat16 is several times faster than an exact one and wrong in the third digit. By
Cauchy and Schwarz its error is at most what rounding took from the query times the length of the
row, plus what rounding took from the row times the length of the query. A row whose product stays
below the threshold by more than that cannot be among the strongest. The others are multiplied again
in double precision, so that answers are exact and do not depend on how rows are cut into blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from forebear.store.manifest import SCALE_COLUMNS
from forebear.store.rows import decode

WIDE = 4  # queries from which float32 rows are worth rounding: fewer only wait for memory
STEP_BYTES = 2**21  # of the rows in one product, so that they stay in a core's cache
ROUNDED = 2.0**-8  # largest relative error of rounding to bfloat16
ROUNDINGS = 3  # of a product: its own, the threshold's, and one spare
WITH_SCALE = 2  # further ones: the scale's, and that of the product with it
TINY = 2.0**-110  # products of smaller numbers may be flushed to zero
EXACT_ROWS = 2048  # at a time in double precision
SETTLED = 256  # pairs at a time, likewise: small enough for the cache


@dataclass(frozen=True)
class Screen:
    """Queries made ready for cheap products with rows of one stored type.

    Attributes:
        queries: `[q, d]` in double precision.
        rounded: `[d, q]` in the type of the products.
        slack: `[q]` largest error of a product with a row of length one, without that of its own
            rounding.
        lengths: `[q]` largest products with a row of length one.
    """

    queries: Tensor
    rounded: Tensor
    slack: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, queries: Tensor, stored: torch.dtype, *, by_column: bool = False) -> "Screen":
        """For `queries` `[q, d]` and rows stored as `stored`, with scales of columns or not."""
        exact = queries.double()
        narrow = stored != torch.float32 or len(queries) >= WIDE
        rounded = exact.to(torch.bfloat16 if narrow else torch.float32)
        lost = (exact - rounded.double()).norm(dim=1)
        dimension = queries.shape[1]
        # Rows in bfloat16 and int8 are not rounded further. Sums are in float32, in any order.
        rounds = by_column or stored in (torch.float32, torch.float16)
        row = ROUNDED if narrow and rounds else 0.0
        slack = lost + (row + dimension * 2.0**-22) * exact.norm(dim=1)
        # Norms may be those of rows before they were stored.
        grown = dimension**0.5 / 127 if stored == torch.int8 else 0.02
        lengths = exact.norm(dim=1) * (1 + grown)
        return cls(exact, rounded.T.contiguous(), slack * (1 + grown), lengths)

    def products(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """Cheap products `[b, q]` with rows `[b, d]`."""
        kind = self.rounded.dtype
        if values.dtype == kind and scales is None:
            return values @ self.rounded
        out = torch.empty(len(values), self.rounded.shape[1], dtype=kind)
        step = min(len(values), max(64, STEP_BYTES // (values.shape[1] * kind.itemsize)))
        buffer = None if values.dtype == kind else torch.empty(step, values.shape[1], dtype=kind)
        for start in range(0, len(values), step):
            part = values[start : start + step]
            if scales is not None and scales.ndim == 2:
                assert buffer is not None
                part = _scaled(part, scales[start : start + step], buffer)
            elif buffer is not None:
                part = buffer[: len(part)].copy_(part)
            torch.mm(part, self.rounded, out=out[start : start + step])
        if scales is None or scales.ndim == 2:
            return out
        return out.mul_(scales.to(out.dtype)[:, None])

    def reach(self, thresholds: Tensor) -> float:
        """Length that a row must exceed for any product to possibly exceed its threshold `[q]`."""
        # A query of zeros gives zero with every row: 0/0 is no obstacle, and −1/0 is none.
        return float((thresholds.double() / self.lengths).nan_to_num(torch.inf, torch.inf).min())

    def floors(self, thresholds: Tensor, longest: float, *, scaled: bool) -> Tensor:
        """What a cheap product must exceed for the exact one to possibly exceed a threshold.

        Args:
            thresholds: `[q, ...]` float32.
            longest: length of the longest row.
            scaled: whether the rows have scales.
        """
        return self.lowered(thresholds, longest, scaled=scaled).to(self.rounded.dtype)

    def lowered(self, values: Tensor, longest: float, *, scaled: bool) -> Tensor:
        """`values` `[q, ...]` less the largest error that a cheap product can have, in float32."""
        slack = (self.slack * longest + TINY).view(-1, *[1] * (values.ndim - 1))
        lower = values.double() - slack
        once = ROUNDED if self.rounded.dtype == torch.bfloat16 else 2.0**-24
        return (lower - lower.abs() * (once * (ROUNDINGS + WITH_SCALE * scaled))).float()

    def settle(
        self, values: Tensor, scales: Tensor | None, rows: Tensor, queries: Tensor
    ) -> Tensor:
        """Exact products `[m]` of single pairs, rounded to float32."""
        found = torch.empty(len(rows))
        for start in range(0, len(rows), SETTLED):
            part = slice(start, start + SETTLED)
            some = values.index_select(0, rows[part])
            if scales is not None:
                some = decode(some, scales[rows[part]])
            asked = self.queries.index_select(0, queries[part])
            found[part] = asked.mul_(some.double()).sum(1).float()
        return found

    def exact(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """Exact products `[b, q]` of all pairs, rounded to float32."""
        return (decode(values, scales).double() @ self.queries.T).float()


def _scaled(values: Tensor, scales: Tensor, buffer: Tensor) -> Tensor:
    """`values` `[b, d]` times `scales` `[b, g]` of their columns, rounded once, in `buffer`."""
    out, width = buffer[: len(values)], values.shape[1]
    whole = width - width % SCALE_COLUMNS
    scales = scales.float()  # products of mixed types are slower with bfloat16 than with float32
    cut = (-1, SCALE_COLUMNS)
    if whole:
        torch.mul(
            values[:, :whole].unflatten(1, cut),
            scales[:, : whole // SCALE_COLUMNS, None],
            out=out[:, :whole].unflatten(1, cut),
        )
    if whole < width:
        torch.mul(values[:, whole:], scales[:, -1:], out=out[:, whole:])
    return out
