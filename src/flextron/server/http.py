"""What surrounds every request: its id, the access log, authorization, unexpected errors, and reading its body."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Collection
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flextron.dialects import messages
from flextron.server.browsers import check_host, check_origin
from flextron.serving.errors import ApiError, bad_request, invalid_body, too_slow

__all__ = ["RequestMiddleware", "answer_error", "body_chunks", "check_json", "read_body"]

_log = logging.getLogger("flextron.server")
_GOOD_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_OPEN = frozenset({"/health", "/metrics", "/openapi.json", "/ping", "/version"})
"""Paths that need no key."""
_PATIENCE = 8
"""How many times the allowed size is read and dropped, so that the client gets to read the answer."""

B = TypeVar("B", bound=BaseModel)


def answer_error(error: ApiError, path: str) -> JSONResponse:
    """A refusal over HTTP, in the form of the path's protocol."""
    body = messages.refusal(error) if path.startswith("/v1/messages") else error.body()
    return JSONResponse(body, error.status, error.headers)


class RequestMiddleware:
    """ASGI middleware, the outermost one."""

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        allowed_hosts: Collection[str] | None = (),
        allowed_origins: Collection[str] = (),
        open_paths: Collection[str] = (),
    ) -> None:
        """Wrap an app.

        Args:
            app: the application that answers.
            api_key: without one everyone may enter, but no web page of another origin.
            allowed_hosts: names beside those of loopback; None for any name.
            allowed_origins: origins of web pages that may do what the server's own may.
            open_paths: paths beside the usual ones that need no key.
        """
        self._app, self._key = app, None if api_key is None else api_key.encode()
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)
        self._open = _OPEN.union(open_paths)
        self._hosts = None if allowed_hosts is None else frozenset(host.lower() for host in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, arrived, status = Headers(scope=scope), time.monotonic(), 0
        given = headers.get("x-request-id", "")
        request_id = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex

        is_head = scope["method"] == "HEAD"

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif is_head and message["type"] == "http.response.body":
                message = dict(message, body=b"")
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            app = self._app if refusal is None else answer_error(refusal, scope["path"])
            # what has GET has HEAD, with the same headers
            await app(dict(scope, method="GET") if is_head else scope, receive, tagged)
        except Exception:
            _log.exception("request %s failed", request_id)
            if not status:
                failure = ApiError(500, "an unexpected error; the server's log says more", kind="server_error")
                await answer_error(failure, scope["path"])(scope, receive, tagged)
        finally:
            seconds = time.monotonic() - arrived
            # repr: a path may hold line breaks
            _log.info("%s %s %r %d %.3f s", request_id, scope["method"], scope["path"], status, seconds)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Why a request may not enter, if it may not."""
        try:
            if self._hosts is not None:
                check_host(scope, headers, self._hosts)
            if self._key is None:
                check_origin(scope, headers, self._origins)
        except ApiError as error:
            return error
        if scope["method"] == "OPTIONS" and self._origins and "access-control-request-method" in headers:
            return None  # a browser's question, which holds no key
        return None if self._may_enter(scope["path"], headers) else _no_key()

    def _may_enter(self, path: str, headers: Headers) -> bool:
        if self._key is None or path in self._open:
            return True
        # Anthropic's clients have a header of their own
        given = headers.get("authorization") or f"bearer {headers.get('x-api-key', '')}"
        scheme, _, key = given.partition(" ")
        return hmac.compare_digest(key.strip().encode(), self._key) and scheme.lower() == "bearer"


def _no_key() -> ApiError:
    message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
    headers = {"www-authenticate": "Bearer"}
    return ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers)


async def read_body(request: Request, kind: type[B], max_bytes: int, seconds: float) -> B:
    """The body of a request as a `kind`.

    Args:
        request: whose body has not been read.
        kind: what it must be.
        max_bytes: largest size of the body.
        seconds: for all of it to arrive.

    Raises:
        ApiError: it is too large, too slow, no JSON, or not what `kind` says.
    """
    check_json(request)
    try:
        raw = await asyncio.wait_for(_read(request, max_bytes), seconds)
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise too_slow(seconds) from error
    data = _parse(raw)
    if not isinstance(data, dict):
        raise bad_request("the body must be a JSON object")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise invalid_body(error) from error


def check_json(request: Request) -> None:
    """See that a body is sent as JSON, which a web page of another origin cannot do without asking first.

    Raises:
        ApiError: it is sent as something else.
    """
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        message = f"the body must be JSON, sent with content-type: application/json, not {given[:100]!r}"
        raise ApiError(415, message, code="unsupported_media_type")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        message = f"the body must not be compressed (content-encoding: {encoding[:100]!r}); send it as it is"
        raise ApiError(415, message, code="unsupported_media_type")


async def _read(request: Request, max_bytes: int) -> bytes:
    kept = bytearray()
    async for chunk in body_chunks(request, max_bytes):
        kept += chunk
    return bytes(kept)


async def body_chunks(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """The body of a request piece by piece.

    Raises:
        ApiError: it is too large, once the allowed part has been returned; or the client left.
    """
    declared = request.headers.get("content-length", "")
    total = int(declared) if declared.isdecimal() else 0
    if total <= _PATIENCE * max_bytes:
        total = 0
        try:
            async for chunk in request.stream():
                total += len(chunk)
                if total <= max_bytes:
                    yield chunk
                if total > _PATIENCE * max_bytes:
                    break
        except ClientDisconnect as error:
            raise bad_request("the client left before the body was complete") from error
    if total > max_bytes:
        raise ApiError(413, f"the body is larger than {max_bytes} bytes", code="request_too_large")


def _parse(body: bytes) -> Any:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        data = json.loads(body.decode(), parse_constant=refuse)
        if b"\\u" in body:
            # halves of surrogate pairs, which no text may hold, come in by escapes only
            json.dumps(data, ensure_ascii=False).encode()
        return data
    except (ValueError, RecursionError) as error:
        # of the message only the reason: it may quote the body
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise bad_request(f"the body is no valid JSON in UTF-8 ({reason})") from error
