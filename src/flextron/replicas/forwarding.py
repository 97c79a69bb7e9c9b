"""A request on its way from the ingress to a replica, and the answer on its way back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from flextron.replicas.routes import Wanted

__all__ = ["ELSEWHERE", "Forwarded", "answers"]

ELSEWHERE = "flextron.elsewhere"
"""Type of the message by which a replica says that it has done nothing, and that another one may."""
_KEYS = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
_LEAVE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A whole request."""

    scope: dict[str, Any]
    body: bytes
    wanted: Wanted

    @classmethod
    def of(cls, scope: Scope, body: bytes, wanted: Wanted) -> Forwarded:
        """Only what is plain data."""
        plain = {key: scope[key] for key in _KEYS if key in scope}
        plain |= {key: tuple(scope[key]) for key in ("client", "server") if scope.get(key)}
        plain["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        return cls(plain, body, wanted)


async def answers(app: ASGIApp, asked: Forwarded) -> AsyncIterator[list[Message]]:
    """The messages of an application, as they come, several at once where they come fast.

    Closing the iterator tells the application that the client has left.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    requested, gone = False, asyncio.Event()

    async def receive() -> Message:
        nonlocal requested
        if not requested:
            requested = True
            return {"type": "http.request", "body": asked.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    running = asyncio.ensure_future(app({**asked.scope, "root_path": ""}, receive, send))
    running.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        is_open = True
        while is_open:
            found = [await messages.get()]
            while not messages.empty():
                found.append(messages.get_nowait())
            is_open = found[-1] is not None
            if told := [message for message in found if message is not None]:
                yield told
    finally:
        gone.set()
        await asyncio.wait({running}, timeout=_LEAVE_SECONDS)
        running.cancel()
    if not running.cancelled():
        running.result()
