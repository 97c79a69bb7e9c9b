"""Tables that lose nothing, however narrow the terminal is: cells wrap between words, never within a number.

Rich cuts cells with an ellipsis where a table does not fit, so the widths are settled here. Where not even the longest
words fit side by side, each row stands upright.
"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_one", "print_rows"]

_GAP = 2
"""Characters between two columns."""


def print_rows(console: Console, rows: list[dict[str, Any]], title: str) -> None:
    """Rows below each other, one alone turned upright."""
    _title(console, title)
    if not rows:
        return
    names = [name.replace("_", " ") for name in rows[0]]
    cells = [[_cell(value) for value in row.values()] for row in rows]
    widths = _widths([[name, *column] for name, column in zip(names, zip(*cells, strict=True), strict=True)], console)
    if widths is None:
        for row in rows:
            print_one(console, row)
        return
    table = _table(show_header=True)
    for name, width, value in zip(names, widths, rows[0].values(), strict=True):
        table.add_column(
            Text(name), width=width, overflow="fold", justify="left" if isinstance(value, str) else "right"
        )
    for row_cells in cells:
        table.add_row(*map(Text, row_cells))
    console.print(table)


def print_one(console: Console, row: dict[str, Any], title: str | None = None) -> None:
    """A single row, turned upright."""
    if title is not None:
        _title(console, title)
    names = [name.replace("_", " ") for name in row]
    longest = max(map(len, names), default=0)
    # names make way only on a terminal that they would fill
    width = min(longest, console.width // 2)
    table = _table(show_header=False)
    table.add_column(width=width, overflow="fold")
    table.add_column(overflow="fold")
    for name, value in zip(names, row.values(), strict=True):
        table.add_row(Text(name), Text(_cell(value)))
    console.print(table)
    console.print()


def _title(console: Console, title: str) -> None:
    console.print(Text(title, style="bold", overflow="fold"))


def _table(*, show_header: bool) -> Table:
    return Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0), show_header=show_header
    )


def _widths(columns: list[list[str]], console: Console) -> list[int] | None:
    """Widths of columns: whole lines if there is room, the narrowest first; None if not even words fit."""
    least = [max((len(word) for text in column for word in text.split()), default=1) for column in columns]
    wanted = [max(map(len, column)) for column in columns]
    free = console.width - _GAP * (len(columns) - 1) - sum(least)
    if free < 0:
        return None
    for i in sorted(range(len(columns)), key=lambda i: wanted[i] - least[i]):
        more = min(free, wanted[i] - least[i])
        least[i] += more
        free -= more
    return least


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
