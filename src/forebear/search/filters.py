"""Which rows a search looks at: conditions on the columns of a store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from forebear.errors import DataError

Column = Callable[[str], np.ndarray]


class Filter(Protocol):
    """Says of each row whether it takes part."""

    def matches(self, column: Column, rows: slice) -> np.ndarray:
        """`[b]` bool of the rows in `rows`; `column(name)` is a column of all rows, `[n]`."""
        ...


class _Combining:
    """Conditions combine with `&`, `|` and `~`."""

    def __and__(self, other: Filter) -> "Both":
        return Both(self, other)  # type: ignore[arg-type]

    def __or__(self, other: Filter) -> "Either":
        return Either(self, other)  # type: ignore[arg-type]

    def __invert__(self) -> "Not":
        return Not(self)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Equals(_Combining):
    """Rows whose column has this value."""

    column: str
    value: Any

    def matches(self, column: Column, rows: slice) -> np.ndarray:
        """Compare, refusing a value of another kind than the column's."""
        values = column(self.column)[rows]
        _require_kind(self.column, values, self.value)
        return values == self.value


@dataclass(frozen=True)
class OneOf(_Combining):
    """Rows whose column has one of these values."""

    column: str
    values: Sequence[Any]

    def matches(self, column: Column, rows: slice) -> np.ndarray:
        """Look each up, refusing values of another kind than the column's."""
        values = column(self.column)[rows]
        for value in self.values:
            _require_kind(self.column, values, value)
        return np.isin(values, list(self.values))


@dataclass(frozen=True)
class Between(_Combining):
    """Rows whose column lies between two values, both included; None leaves a side open."""

    column: str
    low: Any = None
    high: Any = None

    def matches(self, column: Column, rows: slice) -> np.ndarray:
        """Compare with both ends."""
        values = column(self.column)[rows]
        inside = np.ones(len(values), bool)
        if self.low is not None:
            _require_kind(self.column, values, self.low)
            inside &= values >= self.low
        if self.high is not None:
            _require_kind(self.column, values, self.high)
            inside &= values <= self.high
        return inside


@dataclass(frozen=True)
class Both(_Combining):
    """Rows that match two conditions: `one & other`."""

    one: Filter
    other: Filter

    def matches(self, column: Column, rows: slice) -> np.ndarray:
        """Both hold."""
        return self.one.matches(column, rows) & self.other.matches(column, rows)


@dataclass(frozen=True)
class Either(_Combining):
    """Rows that match at least one of two conditions: `one | other`."""

    one: Filter
    other: Filter

    def matches(self, column: Column, rows: slice) -> np.ndarray:
        """At least one holds."""
        return self.one.matches(column, rows) | self.other.matches(column, rows)


@dataclass(frozen=True)
class Not(_Combining):
    """Rows that do not match a condition: `~condition`."""

    condition: Filter

    def matches(self, column: Column, rows: slice) -> np.ndarray:
        """It does not hold."""
        return ~self.condition.matches(column, rows)


def _require_kind(name: str, values: np.ndarray, value: Any) -> None:
    """Numpy calls a text unequal to every number: a typing mistake would find nothing."""
    is_text = values.dtype.kind in "US" or (
        values.dtype == object and len(values) > 0 and isinstance(values[0], str)
    )
    if is_text != isinstance(value, str):
        kind = "text" if is_text else str(values.dtype)
        raise DataError(f"column {name} holds {kind} and {value!r} is not: compare like with like")
