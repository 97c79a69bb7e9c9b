"""Server-sent events out of the pieces in which the network delivers them.

Lines end at a line feed alone (and a carriage return before it). `str.splitlines` would also cut at characters such as
U+2028, which servers may send unescaped within a token.
"""

from __future__ import annotations

__all__ = ["EventStream"]


class EventStream:
    """Collects bytes; gives the data of every event that is whole."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that end in this piece, in order; comments and other fields are left out."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
