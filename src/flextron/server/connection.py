"""A client's connection, which never waits forever, whatever the client does.

uvicorn closes connections that are idle between two requests, but waits without end for a request that comes byte by
byte, and for a client that does not read its answer. Bodies have a limit of their own, in `http`.

A client that has said all it has to say may close its side of the connection and wait for the answer; one that has gone
away looks the same until something is written to it. So an answer may still begin for a moment, and one that has begun
goes on until the other side refuses it. uvicorn gives none.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from flextron.serving.errors import ApiError, bad_request, too_slow

__all__ = ["Connection"]

_HALF_CLOSED_SECONDS = 1.0
"""Time for an answer to begin after the client has closed its side."""


class Connection(H11Protocol):
    """HTTP/1.1 with limits on the client's time. It refuses what is no HTTP in OpenAI's shape."""

    def __init__(self, *, client_seconds: float, **options: Any) -> None:
        """Take uvicorn's options.

        Args:
            client_seconds: for the client to send a request's headers, and to take what waits for it.
            options: uvicorn's.
        """
        super().__init__(**options)
        self._client_seconds = client_seconds
        self._sending, self._taking, self._beginning = (_Timer(self.loop) for _ in range(3))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is here."""
        super().connection_made(transport)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        super().connection_lost(exc)
        self._sending.cancel()
        self._taking.cancel()
        self._beginning.cancel()

    def data_received(self, data: bytes) -> None:
        """It sent something."""
        super().data_received(data)
        self._watch_headers()

    def eof_received(self) -> bool:  # type: ignore[override]
        """It sends nothing more; whether the connection stays open for an answer."""
        is_asked = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        if self.cycle is None or self.cycle.response_complete or not is_asked:
            return False
        self.cycle.keep_alive = False
        self._beginning.start(_HALF_CLOSED_SECONDS, self._leave_unless_begun)
        return True

    def _leave_unless_begun(self) -> None:
        if self.cycle is None or not self.cycle.response_started:
            self.transport.close()

    def pause_writing(self) -> None:
        """It does not read as fast as it is answered."""
        super().pause_writing()
        self._taking.start(self._client_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._taking.cancel()

    def send_400_response(self, msg: str) -> None:
        """What it sent is no HTTP."""
        self._refuse(bad_request("this is no valid HTTP request"))

    def _watch_headers(self) -> None:
        """The time runs from the first byte of a request (of the first request: from the start) to its last header."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._sending.cancel()
        elif not self.transport.is_closing():
            self._sending.start(self._client_seconds, lambda: self._refuse(too_slow(self._client_seconds)))

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            head = h11.Response(status_code=error.status, headers=list(headers.items()), reason=b"Refused")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Timer:
    """Calls something after a time, unless it is cancelled before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, call: Callable[[], None]) -> None:
        """Nothing happens while it runs."""
        if self._handle is None:
            self._handle = self._loop.call_later(seconds, call)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
