"""One line of progress that fits the terminal: steps and the time left always, then the bar and the latest figures."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console
from rich.progress import MofNCompleteColumn, ProgressColumn, Task, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

__all__ = ["ProgressLine"]

_SHORTEST_BAR, _LONGEST_BAR = 8, 40
_GAP = 1


class ProgressLine(ProgressColumn):
    """Description, bar, steps, time, time left, and as many figures as there is room for; `figures` is a task field."""

    def __init__(self, console: Console) -> None:
        """Draw on a console of any width, which may change."""
        super().__init__(table_column=Column(no_wrap=True))
        self._console = console
        self._steps, self._elapsed, self._left = MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()

    def render(self, task: Task) -> Table:
        """The line; on a narrow terminal the description stands above it."""
        steps, elapsed, left = (column.render(task) for column in (self._steps, self._elapsed, self._left))
        room = self._console.width - 1 - sum(text.cell_len + _GAP for text in (steps, left))
        numbers = [steps, left]
        if room >= elapsed.cell_len + _GAP:
            numbers.insert(1, elapsed)
            room -= elapsed.cell_len + _GAP
        numbers = [text for text in numbers if text]
        above = cell_len(task.description) + _GAP + _SHORTEST_BAR > room
        room -= 0 if above else cell_len(task.description) + _GAP
        figures: list[Text] = []
        for figure in task.fields["figures"]:
            if len(figure) + 2 * _GAP <= room - _SHORTEST_BAR:
                figures.append(Text(f" {figure}"))
                room -= len(figure) + 2 * _GAP
        bar = ProgressBar(total=task.total, completed=task.completed, width=max(0, min(room, _LONGEST_BAR)))
        line = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        line.add_row(*([] if above else [Text(task.description)]), *([bar] if bar.width else []), *numbers, *figures)
        if not above:
            return line
        both = Table.grid()
        both.add_row(Text(task.description, overflow="fold"))
        both.add_row(line)
        return both
