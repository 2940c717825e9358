"""Descriptions of losses and measurements, as records have them, in words."""

from collections.abc import Mapping
from typing import Any

LISTED = 6
"""Values of a list that are written out."""


def described(value: Any) -> str:
    """One line: `denoising: prediction epsilon, levels 10 from 50 to 950, seed 0`."""
    if not isinstance(value, Mapping):
        return _value(value)
    name = value.get("type", value.get("function"))
    # The hash of a function's code tells records apart, and people nothing.
    rest = {key: one for key, one in value.items() if key not in ("type", "function", "code")}
    facts = ", ".join(f"{key} {_value(one)}" for key, one in rest.items())
    return ": ".join(part for part in (None if name is None else str(name), facts) if part)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = described(value)
        return f"({inner})" if " " in inner else inner
    if isinstance(value, list | tuple):
        if len(value) > LISTED:
            return f"{len(value)} from {_value(value[0])} to {_value(value[-1])}"
        return " ".join(_value(one) for one in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)
