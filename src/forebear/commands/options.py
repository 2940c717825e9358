"""What several commands share: examples under their help, and settings of methods."""

import json
from collections.abc import Sequence
from typing import Any

from forebear.errors import ForebearError


def examples(*lines: str) -> str:
    """Lines to type, for the end of a command's help."""
    return "[bold]Examples[/bold]\n" + "\n".join(f"  {line}" for line in lines)


def settings_of(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs; values are JSON where they can be, otherwise text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ForebearError(f"--option {pair!r} is not KEY=VALUE: write it like damping=0.1")
        if key in settings:
            raise ForebearError(f"--option {key} was given twice: keep one of them")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def settings_by_method(names: Sequence[str], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of each method; with several, the key of a setting begins with the method's name."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    if len(found) < len(names):
        raise ForebearError(f"--method names one of {', '.join(names)} twice: keep one of them")
    for key, value in settings.items():
        name, dot, rest = key.partition(".")
        if dot and name in found:
            found[name][rest] = value
        elif len(names) == 1:
            found[names[0]][key] = value
        else:
            raise ForebearError(
                f"--option {key} does not say which method it is for: write it like "
                f"{names[0]}.{key}={value}"
            )
    return found
