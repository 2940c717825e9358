"""Tables of text on a console."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console() -> "Console":
    """One as wide as the terminal."""
    from rich.console import Console

    # A pipe has no width; 80 columns would break ids that a script wants to read.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def print_table(columns: list[str], rows: list[list[str]], right: Sequence[str] = ()) -> None:
    """Print `rows` under `columns`; those named in `right` are set to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def cell(value: Any) -> str:
    """A value in a cell of a table."""
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return "–" if value is None else str(value)
