"""Recorded loads: when requests came and how long they were.

Two formats are told apart by their header: Azure's LLM inference traces (`TIMESTAMP,ContextTokens,GeneratedTokens`,
https://github.com/Azure/AzurePublicDataset) and BurstGPT (`Timestamp,Model,Request tokens,Response tokens,…`,
https://github.com/HPMLL/BurstGPT, seconds). Files may be compressed with Zstandard (`.zst`).
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

import zstandard

from flextron.bench.lengths import Sizes
from flextron.errors import FlextronError

__all__ = ["TraceEntry", "open_text", "read_trace", "slice_trace"]

# Azure writes seven digits of a second, which datetime does not read before Python 3.11.
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d+)?(?:Z|\+00:00)?")

_COLUMNS = (
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ("Timestamp", "Request tokens", "Response tokens"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceEntry:
    """One recorded request."""

    time_s: float
    """Seconds, from an origin of the trace's own."""
    sizes: Sizes


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """The file as text, decompressed where its name ends in `.zst`.

    Raises:
        FlextronError: the file is missing, not text, or not what its name says.
    """
    try:
        with path.open("rb") as raw:
            stream = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
            with TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
                yield text
    except FileNotFoundError:
        raise FlextronError(f"{path} does not exist") from None
    except (UnicodeDecodeError, zstandard.ZstdError, csv.Error) as error:
        raise FlextronError(f"{path} cannot be read as text ({error}); download it again") from error


def _seconds(text: str) -> float:
    match = _TIMESTAMP.fullmatch(text.strip())
    if match is None:
        return float(text)
    day, clock, fraction = match.groups()
    whole = datetime.fromisoformat(f"{day} {clock}").replace(tzinfo=timezone.utc).timestamp()
    return whole + float(f"0{fraction or ''}")


def read_trace(path: Path) -> list[TraceEntry]:
    """All requests of a trace, by time; requests that failed when it was recorded (0 tokens) are left out.

    Raises:
        FlextronError: the file is missing, of another format, empty, or a line of it is broken.
    """
    entries = []
    with open_text(path) as text:
        rows = csv.DictReader(text)
        names = next((names for names in _COLUMNS if set(names) <= set(rows.fieldnames or ())), None)
        if names is None:
            wanted = " or ".join(",".join(columns) for columns in _COLUMNS)
            raise FlextronError(f"{path} is no trace: its first line must name the columns {wanted}")
        for row in rows:
            try:
                time_s, prompt, output = _seconds(row[names[0]]), int(row[names[1]]), int(row[names[2]])
                if not math.isfinite(time_s) or prompt < 0 or output < 0:
                    raise ValueError
            except (ValueError, TypeError):
                raise FlextronError(
                    f"{path}, line {rows.line_num}: a time and two token counts are needed, not "
                    f"{','.join(str(row[name]) for name in names)!r}"
                ) from None
            if prompt and output:
                entries.append(TraceEntry(time_s=time_s, sizes=Sizes(prompt=prompt, output=output)))
    if not entries:
        raise FlextronError(f"{path} holds no requests")
    return sorted(entries, key=lambda entry: entry.time_s)


def slice_trace(
    entries: list[TraceEntry], *, start_s: float = 0.0, seconds: float | None = None, rescale: float = 1.0
) -> list[TraceEntry]:
    """A piece of a trace, replayed faster or slower.

    Args:
        entries: requests by time.
        start_s: where the piece begins, in seconds after the first request.
        seconds: how long it is in the trace's time; to the end by default.
        rescale: factor on the rate: 2 plays the piece in half its time.

    Returns:
        The requests of the piece, timed from its beginning.

    Raises:
        FlextronError: a value is out of range, or no request lies in the piece.
    """
    if not (start_s >= 0 and (seconds is None or seconds > 0) and 0 < rescale < math.inf):
        raise FlextronError("a trace's start must not be negative, and its seconds and rescaling must be positive")
    origin = entries[0].time_s + start_s
    end = math.inf if seconds is None else origin + seconds
    piece = [
        TraceEntry(time_s=(entry.time_s - origin) / rescale, sizes=entry.sizes)
        for entry in entries
        if origin <= entry.time_s < end
    ]
    if not piece:
        raise FlextronError(f"no request of the trace lies in the piece from {start_s:g} s on; choose another")
    return piece
