"""The history of figures: a line for each figure of each run, and which ratios have become worse since the last run.

`benchmarks/results/history.jsonl` is only ever added to. A figure is compared with its last value on the same machine,
if it is a ratio: what is measured against a peer, a limit or another part of the same run moves less with the day
than seconds do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from benchmarks.harness import RESULTS
from flextron.errors import FlextronError
from flextron.files import checked

__all__ = ["HISTORY", "Change", "Entry", "append", "entries_of", "read_history", "worse"]

HISTORY = RESULTS / "history.jsonl"
_TOLERANCE = 0.05
_RATIO = re.compile(r"x|ratio|of (?!\d).*")
"""Units of ratios: also `of the limit`, but not counts such as `of 12`."""


class Entry(BaseModel):
    """One figure of one run, as a line has it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    date: str
    commit: str
    machine: str
    suite: str
    figure: str
    value: float
    unit: str
    op: Literal["<=", ">=", "=="]
    """`>=` where more is better, `<=` where less is."""

    @property
    def is_ratio(self) -> bool:
        """Whether it is compared with its last value."""
        is_one = _RATIO.fullmatch(self.unit) is not None and self.op in (">=", "<=")
        return is_one and math.isfinite(self.value) and self.value > 0


@dataclass(frozen=True, slots=True)
class Change:
    """A ratio that has become worse."""

    before: Entry
    after: Entry

    def __str__(self) -> str:
        """One sentence."""
        a, b = self.before, self.after
        return (
            f"{b.suite}: {b.figure}: {b.value:.4g} {b.unit}, which is {abs(b.value / a.value - 1):.1%} worse than "
            f"{a.value:.4g} on {a.date} ({a.commit})"
        )


def entries_of(result: dict[str, Any]) -> list[Entry]:
    """The figures of a suite's result file."""
    hardware = result["hardware"]
    where = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads"
    return [
        Entry(
            date=result["date"],
            commit=result["commit"],
            machine=f"{hardware['gpu']}, {where}" if hardware["gpu"] else where,
            suite=result["suite"],
            figure=figure["name"],
            value=float(figure["value"]),
            unit=figure["unit"],
            op=figure["op"],
        )
        for figure in result["figures"]
    ]


def read_history(path: Path) -> list[Entry]:
    """All lines, the oldest first; none if there is no file.

    Raises:
        FlextronError: a line is no figure; names it.
    """
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        what, remedy = f"line {number} of {path}", "take that line out"
        try:
            data = json.loads(line)
        except ValueError as error:
            raise FlextronError(f"{what} is no JSON; {remedy}") from error
        entries.append(checked(Entry, data, what, remedy))
    return entries


def append(path: Path, entries: Iterable[Entry]) -> None:
    """Add lines at the end, in one write."""
    lines = "".join(json.dumps(entry.model_dump()) + "\n" for entry in entries)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)


def worse(history: Sequence[Entry], entries: Iterable[Entry]) -> list[Change]:
    """Ratios that are more than 5 % worse than when they were last measured on the same machine."""
    last = {(e.machine, e.suite, e.figure): e for e in history}
    changes = []
    for entry in entries:
        before = last.get((entry.machine, entry.suite, entry.figure))
        if before is None or not (before.is_ratio and entry.is_ratio) or before.op != entry.op:
            continue
        gain = entry.value / before.value if entry.op == ">=" else before.value / entry.value
        if gain < 1 - _TOLERANCE:
            changes.append(Change(before, entry))
    return changes
