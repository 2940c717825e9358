"""Rows as they are kept: rounded to a stored type, with norms and scales, or refused."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from forebear.errors import DataError, NonFiniteError
from forebear.store.manifest import SCALE_COLUMNS

SHOWN = 5
LOST = 0.01
"""Share of a row's length that rounding to float16 may take before it is refused."""


def encode(
    values: Tensor, dtype: str, ids: np.ndarray, scale_columns: int = SCALE_COLUMNS
) -> dict[str, Tensor]:
    """`values` and `norms`, and `scales` for int8, of rows `[b, k]`.

    Raises:
        NonFiniteError: a row is NaN or infinite, with ids.
        DataError: a row does not fit into float16.
    """
    values = values.detach().cpu()
    values = values if values.dtype == torch.float64 else values.float()
    norms = torch.linalg.vector_norm(values, dim=1, dtype=values.dtype)
    if not torch.isfinite(norms).all():
        _require_finite(values, ids)
        norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    found = {"norms": norms.float()}
    if dtype == "int8":
        return found | (_with_scales(values) if scale_columns else _with_one_scale(values))
    stored = values.to(getattr(torch, dtype))
    if dtype == "float16":
        _require_kept(norms, stored, ids)
    elif not torch.isfinite(stored.sum()):
        _require_finite(stored, ids)
    return found | {"values": stored}


def decode(values: Tensor, scales: Tensor | None, first: int = 0) -> Tensor:
    """Stored rows as float32.

    Args:
        values: `[b, k]`, or some consecutive columns of the rows.
        scales: `[b]`, or `[b, g]` one for each `SCALE_COLUMNS` columns of the rows, or None.
        first: the column of the rows that `values` begin with.
    """
    values = values.float()
    if scales is None:
        return values
    if scales.ndim == 1:
        return values * scales[:, None]
    by_column = scales.repeat_interleave(SCALE_COLUMNS, 1)
    return values * by_column[:, first : first + values.shape[1]]


def named(ids: np.ndarray | Sequence) -> str:
    """Some ids for a message."""
    shown = ", ".join(repr(item) for item in np.asarray(ids)[:SHOWN].tolist())
    return shown + (" …" if len(ids) > SHOWN else "")


def _with_scales(values: Tensor) -> dict[str, Tensor]:
    """Numbers from −127 to 127, and scales `[b, g]` that the largest of some columns need.

    Of 512 normal numbers the largest is 3.2 and of 16 it is 2.1: the steps are a third smaller
    than with one scale a row, and so is what a search loses (docs/search.md).
    """
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % SCALE_COLUMNS))
    parts = padded.unflatten(1, (-1, SCALE_COLUMNS))  # [b, g, columns]
    scales = _rounded_up(parts.abs().amax(2).float() / 127)
    by = scales.to(values).clamp_min(torch.finfo(torch.float32).tiny)
    whole = (parts / by[:, :, None]).round_().clamp_(-127, 127).to(torch.int8)
    return {"values": whole.flatten(1)[:, : values.shape[1]].contiguous(), "scales": scales}


def _rounded_up(scales: Tensor) -> Tensor:
    """Numbers that are not negative as bfloat16, none of them smaller."""
    rounded = scales.bfloat16()
    next_one = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(rounded.float() < scales, next_one, rounded)


def _with_one_scale(values: Tensor) -> dict[str, Tensor]:
    """Numbers from −127 to 127 and the scale `[b]` that the largest of each row needs."""
    scales = values.abs().amax(1).float() / 127
    by = scales.to(values).clamp_min(torch.finfo(torch.float32).tiny)
    return {"values": (values / by[:, None]).round_().clamp_(-127, 127).to(torch.int8)} | {
        "scales": scales
    }


def _require_finite(values: Tensor, ids: np.ndarray) -> None:
    bad = ~torch.isfinite(values).all(1)
    if bad.any():
        raise NonFiniteError(
            f"{int(bad.sum())} rows are NaN or infinite (ids {named(ids[bad.numpy()])}): remove or "
            "repair these examples, or raise the precision of the model"
        )


def _require_kept(norms: Tensor, stored: Tensor, ids: np.ndarray) -> None:
    after = torch.linalg.vector_norm(stored, dim=1, dtype=torch.float32)
    bad = ~((after - norms).abs() <= LOST * norms)
    if bad.any():
        raise DataError(
            f"{int(bad.sum())} rows are too large or too small for float16 (ids "
            f"{named(ids[bad.numpy()])}): store bfloat16 or float32"
        )
