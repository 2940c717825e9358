"""Where work runs: in this process, in others, on other machines."""

from importlib import import_module
from typing import Any

from forebear.errors import ForebearError, unknown_name
from forebear.executors.base import Executor, InProcess, Work
from forebear.executors.pieces import Pieces, results, write_tensors

EXECUTORS = {
    "in-process": "base.InProcess",
    "processes": "processes.Processes",
    "ray": "ray.Ray",
    "torchrun": "torchrun.Torchrun",
}
"""Names, and where their classes are."""

SETTING: dict[str, tuple[str, type]] = {"processes": ("workers", int), "ray": ("address", str)}
"""What may stand after a name and a colon."""


def get(text: str) -> Executor:
    """The executor that a text names: `in-process`, `processes`, `ray` or `torchrun`.

    `processes:4` has 4 workers, and `ray:ADDRESS` is the cluster at an address (`auto`,
    `host:6379`, `ray://host:10001`).

    Raises:
        UnknownNameError: there is no executor of this name.
        ForebearError: what stands after the name is not understood.
    """
    name, colon, rest = text.strip().partition(":")
    if name not in EXECUTORS:
        raise unknown_name("executor", name, EXECUTORS)
    module, _, kind = EXECUTORS[name].partition(".")
    settings: dict[str, Any] = {}
    if colon:
        if name not in SETTING:
            raise ForebearError(f"executor {text!r}: nothing may stand after {name!r}")
        setting, convert = SETTING[name]
        try:
            settings[setting] = convert(rest)
        except ValueError:
            raise ForebearError(
                f"executor {text!r}: {rest!r} is no number of {setting}; write it like {name}:2"
            ) from None
    return getattr(import_module(f"forebear.executors.{module}"), kind)(**settings)


def available() -> tuple[str, ...]:
    """The names that `get` understands."""
    return tuple(EXECUTORS)


__all__ = [
    "Executor",
    "InProcess",
    "Pieces",
    "Work",
    "available",
    "get",
    "results",
    "write_tensors",
]
