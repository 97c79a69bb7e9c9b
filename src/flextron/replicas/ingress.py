"""What clients talk to: it checks who may enter, sends each request to a replica, and asks another one if that dies.

A request of which the client has seen nothing is given to another replica, unless it may have changed something. An
answer that had begun ends with an error, in the form of its protocol.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from flextron.dialects.messages import refusal
from flextron.replicas.forwarding import ELSEWHERE, Forwarded
from flextron.replicas.routes import JOBS, wanted_of
from flextron.server.http import RequestMiddleware, answer_error, body_chunks
from flextron.server.page.files import PREFIX
from flextron.server.page.routes import open_paths
from flextron.serving.errors import ApiError, bad_request, shutting_down, too_slow
from flextron.serving.settings import ServerSettings

__all__ = ["Ingress"]

_MOST_LOST = 5
"""Replicas that may die over one request before it is refused; it may be what kills them."""
_WAIT_SECONDS = 60.0
"""Time for a replica to take a request."""
_ASK_AGAIN_SECONDS = 0.2
_FORM_BYTES = 65_536
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})

Give = Callable[[Forwarded], Any]
"""Gives a request to a replica; the result is iterated for lists of messages, and may be cancelled."""


class Ingress:
    """An ASGI application in front of replicas. It keeps no state that a second one beside it would need."""

    def __init__(
        self,
        give: Give,
        settings: ServerSettings,
        losses: Collection[type[BaseException]],
        *,
        has_jobs: bool,
    ) -> None:
        """Take where requests go.

        Args:
            give: gives a request to a replica.
            settings: who may enter, and with how much.
            losses: what iterating an answer raises when its replica is gone.
            has_jobs: whether finetuning is offered.
        """
        self._give, self._settings, self._losses = give, settings, tuple(losses)
        self._has_jobs, self._is_draining = has_jobs, False
        self._num_open, self._has_none = 0, asyncio.Event()
        self._entered = RequestMiddleware(
            self._serve,
            api_key=settings.api_key,
            allowed_hosts=settings.allowed_hosts,
            allowed_origins=settings.allowed_origins,
            open_paths=open_paths() if settings.page else (),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http" and "x-request-id" not in Headers(scope=scope):
            # one name for it here and in the replica
            scope = dict(scope, headers=[*scope["headers"], (b"x-request-id", uuid.uuid4().hex.encode())])
        await self._entered(scope, receive, send)

    async def drain(self) -> None:
        """Take no new requests, and wait for those that run, as long as the settings say."""
        self._is_draining = True
        if self._num_open:
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._has_none.wait(), self._settings.drain_seconds)

    async def lost(self) -> None:
        """Wait until nothing can be answered any more, which Ray sees to."""
        await asyncio.Event().wait()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        # nobody waits for the page, whose figures flow without end
        counted = not scope["path"].startswith(PREFIX)
        self._num_open += counted
        self._has_none.clear()
        try:
            await self._pass_on(scope, receive, send)
        except ApiError as error:
            await answer_error(error, scope["path"])(scope, receive, send)
        finally:
            self._num_open -= counted
            if not self._num_open:
                self._has_none.set()

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client leaves before.

        Raises:
            ApiError: nothing was sent, and nothing will be.
        """
        if self._is_draining:
            raise shutting_down()
        method, path = scope["method"], scope["path"]
        if path == PREFIX + "measure":
            raise bad_request("replicas are not measured while they serve; run flextron profile, and start them again")
        body = await self._body(Request(scope, receive))
        wanted = wanted_of(method, path, body, self._settings.name, has_jobs=self._has_jobs)
        answering = asyncio.ensure_future(self._answer(Forwarded.of(scope, body, wanted), send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            leaving.cancel()
            answering.cancel()
            await asyncio.wait({answering})

    async def _body(self, request: Request) -> bytes:
        megabytes = max(self._settings.max_body_mb, self._settings.max_file_mb if self._has_jobs else 0)
        is_file = request.url.path == "/v1/files"
        most = int((megabytes if is_file else self._settings.max_body_mb) * 1e6) + (_FORM_BYTES if is_file else 0)
        seconds = self._settings.client_seconds * (1 + (most // 10e6 if is_file else 0))

        async def read() -> bytes:
            return b"".join([chunk async for chunk in body_chunks(request, most)])

        try:
            return await asyncio.wait_for(read(), seconds)
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise too_slow(seconds) from error

    async def _answer(self, asked: Forwarded, send: Send) -> None:
        """Ask replicas until one has answered.

        Raises:
            ApiError: none has, and the client has seen nothing.
        """
        begun, num_lost, client = time.monotonic(), 0, _Client(asked, send)
        while True:
            was_taken = False
            try:
                async for messages in _answered(self._give(asked), _WAIT_SECONDS):
                    was_taken = True
                    if messages and messages[0]["type"] == ELSEWHERE:
                        break
                    await client.take(messages)
                else:
                    return await client.end()
            except asyncio.TimeoutError as error:
                raise _unavailable("no replica takes requests now; ask again later") from error
            except self._losses as error:
                if client.has_seen:
                    return await client.break_off()
                num_lost += 1
                if was_taken and asked.wanted.kind == JOBS and asked.scope["method"] not in _SAFE:
                    message = "the replica died, so the change may or may not have been made; look, then ask again"
                    raise _unavailable(message) from error
                if num_lost == _MOST_LOST:
                    raise _unavailable(f"{num_lost} replicas died while they answered this request") from error
                client.forget()
                continue
            if time.monotonic() - begun > _WAIT_SECONDS:
                raise _unavailable("no replica takes such requests now; ask again later")
            await asyncio.sleep(_ASK_AGAIN_SECONDS)


async def _answered(answer: Any, seconds: float) -> AsyncIterator[list[Message]]:
    """An answer's lists of messages; the first one must come within some time."""
    try:
        first = True
        while True:
            following = answer.__anext__()
            try:
                messages = await (asyncio.wait_for(following, seconds) if first else following)
            except StopAsyncIteration:
                return
            first = False
            yield messages
    finally:
        answer.cancel()


class _Client:
    """What the client has seen of an answer."""

    def __init__(self, asked: Forwarded, send: Send) -> None:
        self._path, self._send = asked.scope["path"], send
        self._start: Message | None = None
        self.has_seen = False

    async def take(self, messages: list[Message]) -> None:
        """Pass messages on; the head waits for what follows it, so that until then another replica may answer."""
        for message in messages:
            if message["type"] == "http.response.start":
                self._start = message
                continue
            if self._start is not None and not self.has_seen:
                self.has_seen = True
                await self._send(self._start)
            await self._send(message)

    async def end(self) -> None:
        """The replica has said all."""

    def forget(self) -> None:
        """Another replica will answer."""
        self._start = None

    async def break_off(self) -> None:
        """End an answer that had begun.

        Raises:
            ConnectionError: it has no form for errors, so the connection must break.
        """
        kind = Headers(raw=self._start["headers"]).get("content-type", "") if self._start else ""
        if not kind.startswith("text/event-stream"):
            raise ConnectionError("a replica died in the middle of an answer")
        body = _broken(self._path)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _broken(path: str) -> bytes:
    """The last event of a stream."""
    error = ApiError(500, "the replica that answered has died; ask again", kind="server_error", code="replica_died")
    if path.startswith(PREFIX):
        return b""
    if path.startswith("/v1/messages"):
        return f"event: error\ndata: {json.dumps(refusal(error))}\n\n".encode()
    if path.startswith("/v1/responses"):
        return f"event: error\ndata: {json.dumps(error.body()['error'] | {'type': 'error'})}\n\n".encode()
    return f"data: {json.dumps(error.body())}\n\n".encode()


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, kind="server_error", code="no_replica", headers={"retry-after": "1"})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
