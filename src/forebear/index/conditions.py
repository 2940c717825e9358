"""Filters in Qdrant's words."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from forebear.search import Between, Equals, Filter, OneOf
from forebear.search.filters import Both, Either, Not
from forebear.store import Column

FIELD = "columns"
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
LARGEST = 2**53  # ranges are compared as float64


def payload_kinds(columns: Mapping[str, Column]) -> dict[str, str]:
    """Columns that Qdrant can filter by, and as what: one value a row, a name without quoting."""
    kinds = {"bool": "bool", "string": "keyword"}
    kinds |= dict.fromkeys(("int64", "int32"), "integer") | dict.fromkeys(
        ("float64", "float32"), "float"
    )
    return {
        name: kinds[column.dtype]
        for name, column in columns.items()
        if not column.shape and PLAIN.fullmatch(name)
    }


def translated(condition: Filter | None, columns: Mapping[str, Column]) -> Any | None:
    """A Qdrant filter that chooses the same rows, or None where there is none."""
    from qdrant_client import models

    if isinstance(condition, Both | Either):
        one, other = (translated(part, columns) for part in (condition.one, condition.other))
        if one is None or other is None:
            return None
        both = isinstance(condition, Both)
        return models.Filter(must=[one, other]) if both else models.Filter(should=[one, other])
    if isinstance(condition, Not):
        inner = translated(condition.condition, columns)
        return None if inner is None else models.Filter(must_not=[inner])
    if not isinstance(condition, Equals | OneOf | Between):
        return None
    if condition.column not in payload_kinds(columns):
        return None
    wanted = _comparison(condition, columns[condition.column].dtype)
    if wanted is None:
        return None
    key = f"{FIELD}.{condition.column}"
    return models.Filter(must=[models.FieldCondition(key=key, **wanted)])


def _comparison(condition: Equals | OneOf | Between, dtype: str) -> dict[str, Any] | None:
    """What a field is compared with, in the type of the column as numpy compares."""
    from qdrant_client import models

    number = dtype not in ("string", "bool")
    if isinstance(condition, Between):
        bounds = {"gte": condition.low, "lte": condition.high}
        ends = {name: _as_number(end, dtype) for name, end in bounds.items() if end is not None}
        if not number or not ends or None in ends.values():
            return None
        return {"range": models.Range(**ends)}
    values = [condition.value] if isinstance(condition, Equals) else list(condition.values)
    if dtype.startswith("float"):
        if len(values) != 1:
            return None
        value = _as_number(values[0], dtype)
        return None if value is None else {"range": models.Range(gte=value, lte=value)}
    kinds = {"string": (str,), "bool": (bool, np.bool_)}.get(dtype, (int, np.integer))
    if not values or not all(isinstance(value, kinds) for value in values):
        return None
    plain = [np.asarray(value).item() for value in values]
    if number and any(isinstance(value, bool) or abs(value) >= 2**63 for value in plain):
        return None
    if len(plain) == 1:
        return {"match": models.MatchValue(value=plain[0])}
    return None if dtype == "bool" else {"match": models.MatchAny(any=plain)}


def _as_number(value: Any, dtype: str) -> float | None:
    """A bound as numpy compares with it, or None where Qdrant would compare otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        return None
    if dtype == "float32":
        # Python's numbers are rounded to the column's type; the column is widened for numpy's.
        plain = isinstance(value, int) or type(value) in (float, np.float32)
        return float(np.float32(value)) if plain and abs(value) <= LARGEST else None
    return float(value) if abs(value) <= LARGEST else None  # and neither infinite nor NaN
