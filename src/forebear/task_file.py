"""Python files that define a task for the command line: `task()`, `train()`, `queries()` and more.

They are run as programs, so only files that one trusts should be given.
"""

import importlib.util
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from forebear.errors import FormatError

NEEDED = ("task", "train", "queries")


def defined(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """What the functions of a file return, by name; optional ones may be missing.

    Raises:
        FormatError: it is not Python, or lacks a function that is needed.
    """
    with importable(path.resolve().parent):
        module = imported(path, needed)
        names = [*needed, *(name for name in optional if hasattr(module, name))]
        return {name: getattr(module, name)() for name in names}


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Modules beside a file can be imported by it, as when Python runs the file."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def imported(path: Path, needed: Sequence[str] = NEEDED) -> ModuleType:
    """A file as a module, always from its text.

    Raises:
        FormatError: it is not Python, or lacks a function that is needed.
    """
    spec = importlib.util.spec_from_file_location(f"forebear_file_{uuid.uuid4().hex}", path)
    if spec is None:
        raise FormatError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    # Not by the loader: its bytecode cache takes a file edited within a second for the old one.
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    missing = [f"{name}()" for name in needed if not hasattr(module, name)]
    if missing:
        wanted = [f"{name}()" for name in needed]
        raise FormatError(
            f"{path} does not define {', '.join(missing)}: it must define "
            f"{', '.join(wanted[:-1])} and {wanted[-1]}"
        )
    return module
