"""The server as a process: it listens, serves until a signal, lets running answers end, and exits."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from flextron.errors import FlextronError
from flextron.server.connection import Connection
from flextron.serving.service import Service

__all__ = ["DrainingServer", "listen", "serve", "server_config"]

_CLOSE_SECONDS = 5
"""Time for connections to close after the last answer."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        FlextronError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise FlextronError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another host or port"
        ) from error


def serve(app: FastAPI, sock: socket.socket) -> None:
    """Serve until a signal (Ctrl-C or SIGTERM) and until running answers have ended; a second one exits at once."""
    _log_to_stderr()
    asyncio.run(DrainingServer(server_config(app), app.state.service).serve(sockets=[sock]))


def server_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn runs an application of `create_app`."""
    protocol: Any = partial(Connection, client_seconds=app.state.service.settings.client_seconds)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )


class DrainingServer(uvicorn.Server):
    """Goes on listening while running answers end, so that new requests get an answer, too: 503."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        """Take what is to be drained."""
        super().__init__(config)
        self._service = service
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._was_asked = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._was_asked:
            os._exit(128 + sig)
        self._was_asked = True
        if self._loop is None or not self.started:
            self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self._begin_draining)

    def _begin_draining(self) -> None:
        self._drain = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        try:
            await self._service.drain()
        finally:
            self.should_exit = True


def _log_to_stderr() -> None:
    """Log a line for each request and each failure."""
    log = logging.getLogger("flextron.server")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
