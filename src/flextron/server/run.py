"""The server as a process: it listens, serves until a signal, lets running answers end, and exits."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from functools import partial
from types import FrameType
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from flextron.errors import FlextronError
from flextron.server.connection import Connection
from flextron.serving.service import Service
from flextron.serving.settings import ServerSettings

__all__ = ["Drained", "DrainingServer", "listen", "log_to_stderr", "serve", "server_config", "told_address"]

_LOSS_SECONDS = 15.0
"""The most time between the loss of a rank and the end of the process."""
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


def told_address(settings: ServerSettings, host: str, sock: socket.socket) -> str:
    """What is said once a server listens."""
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{sock.getsockname()[1]}"
    page = f"; web page: {url}/" if settings.page else ""
    return f"serving {settings.name} at {url}/v1 (Ctrl-C ends it){page}"


def serve(app: FastAPI, sock: socket.socket) -> None:
    """Serve until a signal (Ctrl-C or SIGTERM) and until running answers have ended; a second one exits at once.

    Raises:
        LostRankError: another rank is gone.
    """
    log_to_stderr()
    service: Service = app.state.service
    config = server_config(app, service.settings.client_seconds)
    asyncio.run(DrainingServer(config, service).serve(sockets=[sock]))
    if service.loss is not None:
        raise service.loss


def server_config(app: ASGIApp, client_seconds: float) -> uvicorn.Config:
    """How uvicorn runs an application.

    Args:
        app: the application.
        client_seconds: for a client to send a request's headers, and to take what waits for it.
    """
    protocol: Any = partial(Connection, client_seconds=client_seconds)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )


class Drained(Protocol):
    """What runs behind an application, as far as its end goes."""

    async def drain(self) -> None:
        """Take no new requests, and wait for those that run."""

    async def lost(self) -> None:
        """Wait until nothing can be answered any more."""


class DrainingServer(uvicorn.Server):
    """Goes on listening while running answers end, so that new requests get an answer, too: 503."""

    def __init__(self, config: uvicorn.Config, service: Drained) -> None:
        """Take what is to be drained."""
        super().__init__(config)
        self._service = service
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._was_asked = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ending = asyncio.ensure_future(self._exit_on_loss())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._was_asked:
            os._exit(128 + sig)
        self._was_asked = True
        if self._loop is None or not self.started:
            self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self._begin_draining)

    async def _exit_on_loss(self) -> None:
        """Without one of the ranks there is nothing to wait for."""
        await self._service.lost()
        # threads that hang in a collective may not let Python end
        deadline = threading.Timer(_LOSS_SECONDS, os._exit, (2,))
        deadline.daemon = True
        deadline.start()
        self.should_exit = True

    def _begin_draining(self) -> None:
        self._drain = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        try:
            await self._service.drain()
        finally:
            self.should_exit = True


def log_to_stderr() -> None:
    """Log a line for each request and each failure."""
    log = logging.getLogger("flextron.server")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
