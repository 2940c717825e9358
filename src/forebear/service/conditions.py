"""Conditions on columns as people type them: `label=3`, `source=web|book`, `date>=2024-01-01`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from forebear.errors import DataError, unknown_name
from forebear.search import Between, Equals, Filter, OneOf
from forebear.store import Column

CONDITION = re.compile(r"\s*(.+?)\s*(>=|<=|=)\s*(.*?)\s*", re.DOTALL)
WRITTEN = {"true": True, "false": False}


def parse(texts: Sequence[str], columns: Mapping[str, Column]) -> Filter | None:
    """The filter that all of `texts` describe together, None for none of them.

    Args:
        texts: `COLUMN=VALUE`, `COLUMN=VALUE|VALUE`, `COLUMN>=VALUE` or `COLUMN<=VALUE`; both ends
            of a range are included.
        columns: of the store.

    Raises:
        UnknownNameError: the store has no such column.
        DataError: a text is no condition, or its value is not of the column's kind.
    """
    found: Any = None
    for text in texts:
        one = _condition(text, columns)
        found = one if found is None else found & one
    return found


def _condition(text: str, columns: Mapping[str, Column]) -> Filter:
    parts = CONDITION.fullmatch(text)
    if parts is None:
        raise DataError(
            f"{text!r} is no condition: write COLUMN=VALUE, COLUMN=ONE|OTHER, COLUMN>=VALUE or "
            f"COLUMN<=VALUE; {known(columns)}"
        )
    name, sign, value = parts.groups()
    kind = kind_of(name, columns)
    if sign == ">=":
        return Between(name, low=_value(name, kind, value))
    if sign == "<=":
        return Between(name, high=_value(name, kind, value))
    if "|" in value:
        return OneOf(name, [_value(name, kind, part.strip()) for part in value.split("|")])
    return Equals(name, _value(name, kind, value))


def kind_of(name: str, columns: Mapping[str, Column]) -> str:
    """What a column that conditions and groups may name holds.

    Raises:
        UnknownNameError: the store has no such column.
        DataError: it has several values a row.
    """
    if not columns:
        raise DataError(f"unknown column {name!r}: {known(columns)}")
    if name not in columns:
        raise unknown_name("column", name, columns)
    if columns[name].shape:
        raise DataError(
            f"column {name!r} has values of shape {columns[name].shape}: conditions and groups "
            "need one value a row"
        )
    return columns[name].dtype


def known(columns: Mapping[str, Column]) -> str:
    """What columns there are, for a message."""
    if not columns:
        return "the store has no columns: give it some when it is built"
    return "columns: " + ", ".join(f"{name} ({c.dtype})" for name, c in sorted(columns.items()))


def _value(name: str, kind: str, text: str) -> Any:
    if kind == "string":
        return text
    try:
        if kind == "bool":
            return WRITTEN[text.lower()]
        return int(text) if kind.startswith("int") else float(text)
    except (ValueError, KeyError):
        needed = "true or false" if kind == "bool" else f"a number ({kind})"
        raise DataError(f"column {name!r} holds {kind} and {text!r} is not {needed}") from None
