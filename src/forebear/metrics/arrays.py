"""Arrays as metrics take them: checked for shape, finite, in float64."""

from typing import Any

import numpy as np
from torch import Tensor

from forebear.errors import DataError, NonFiniteError
from forebear.types import Scores


def numbers(values: Any, what: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """`values` in float64.

    Args:
        values: anything numpy or torch holds.
        what: how messages call it.
        shape: expected; None where any length will do.

    Raises:
        DataError: the shape is another.
        NonFiniteError: an entry is NaN or infinite.
    """
    array = np.asarray(plain(values), dtype=np.float64)
    _require_shape(array, what, shape)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = ", ".join(map(str, bad[0]))
        raise NonFiniteError(f"{what}[{place}] is NaN or infinite ({len(bad)} entries are)")
    return array


def flags(values: Any, what: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """`values` as booleans.

    Raises:
        DataError: the shape is another, or entries are neither boolean nor 0 and 1.
    """
    array = np.asarray(plain(values))
    if array.dtype != bool:
        if not np.isin(array, (0, 1)).all():
            raise DataError(f"{what} must be boolean: is it positions instead of a mask?")
        array = array.astype(bool)
    _require_shape(array, what, shape)
    return array


def plain(values: Any) -> Any:
    """`Scores` and tensors as what numpy reads."""
    values = values.values if isinstance(values, Scores) else values
    return values.detach().cpu() if isinstance(values, Tensor) else values


def _require_shape(array: np.ndarray, what: str, shape: tuple[int | None, ...]) -> None:
    fits = array.ndim == len(shape) and all(
        want in (None, have) for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise DataError(f"{what} has shape {array.shape}: expected ({wanted})")
