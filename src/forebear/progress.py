"""Progress bars that a program may switch on; a library stays silent by default."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
_current: ContextVar[Progress | None] = ContextVar("forebear_progress", default=None)


@contextmanager
def progress(console: Console | None = None) -> Iterator[None]:
    """Show a bar for every long loop inside the block, on standard error.

    On something that is not a terminal nothing is drawn, so logs stay readable.
    """
    console = console or Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bars:
        token = _current.set(bars)
        try:
            yield
        finally:
            _current.reset(token)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items`, advancing a bar when the caller is inside `progress()`."""
    bars = _current.get()
    if bars is None:
        yield from items
        return
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    bar = bars.add_task(description, total=total)
    try:
        for item in items:
            yield item
            bars.advance(bar)
    finally:
        bars.remove_task(bar)


class _CallableModule(ModuleType):
    """Python puts this module where `forebear.progress` is looked up, so it is the function too."""

    def __call__(self, console: Console | None = None) -> AbstractContextManager[None]:
        return progress(console)


sys.modules[__name__].__class__ = _CallableModule
