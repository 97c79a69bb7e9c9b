"""One streamed request over HTTP, and the times at which its text came.

A time is taken when bytes arrive, before they are parsed. Text is what a user would see: a chunk without any (the role
at the beginning of a chat, the final usage) counts for nothing.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from flextron.bench.plan import Request
from flextron.bench.sse import EventStream
from flextron.bench.timeline import Timeline
from flextron.errors import FlextronError

__all__ = ["Client", "Server"]

_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

# Below the 5 s after which common servers close an idle connection: a request must not meet a closing one.
_KEEPALIVE_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Whom to ask, and how."""

    url: str
    """Base URL, with or without `/v1`."""
    model: str
    endpoint: str = "completions"
    """`completions` or `chat`."""
    api_key: str | None = field(default=None, repr=False)
    temperature: float = 0.0
    ignore_eos: bool = False
    """Ask the server not to stop early (an extension that vLLM and llama.cpp know)."""
    timeout_s: float = 600.0
    """Limit on a whole request, from the moment that it is sent."""

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        if self.endpoint not in _PATHS:
            raise FlextronError(f"there is no endpoint {self.endpoint!r}; `completions` and `chat` can be measured")
        if not 0 <= self.temperature < math.inf:
            raise FlextronError(f"the temperature must be a number of at least 0, not {self.temperature:g}")
        if not self.timeout_s > 0:
            raise FlextronError(f"the timeout must be positive, not {self.timeout_s:g} s")
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise FlextronError(f"{self.url!r} is not a URL ({error})") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise FlextronError(f"{self.url!r} is not a URL of a server; give one such as http://127.0.0.1:8000")

    @property
    def address(self) -> str:
        """Full URL of the endpoint."""
        return self.url.rstrip("/").removesuffix("/v1") + _PATHS[self.endpoint]

    def body(self, request: Request) -> dict[str, Any]:
        """What is posted for a request."""
        body: dict[str, Any] = {
            "model": self.model if request.target is None else f"{self.model}@{request.target}",
            "max_tokens": request.sizes.output,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body


class _Failure(Exception):
    """A request that failed: kind and detail."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = " ".join(detail.split())[:300]


@dataclass(slots=True)
class _Stream:
    """What has come of one answer so far."""

    times: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    def take(self, event: bytes, now: float) -> None:
        """Read one event that came at `now`."""
        if event == b"[DONE]":
            self.finished = True
            return
        try:
            chunk = json.loads(event)
            failure = chunk.get("error")
            choices = chunk.get("choices") or ()
            text = "".join(_text(choice) for choice in choices)
            ended = any(choice.get("finish_reason") for choice in choices)
        except (ValueError, AttributeError, TypeError):
            raise _Failure("malformed chunk", event[:200].decode(errors="replace")) from None
        if failure:
            raise _Failure("error in stream", _reason(failure))
        if text:
            self.times.append(now)
        self.finished |= ended
        self.usage = chunk.get("usage") or self.usage


def _text(choice: dict[str, Any]) -> str:
    """The text of a choice of either endpoint, a model's thoughts included."""
    delta = choice.get("delta") or {}
    parts = (choice.get("text"), delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning"))
    return "".join(part for part in parts if part)


def _reason(failure: Any) -> str:
    return str(failure.get("message", failure)) if isinstance(failure, dict) else str(failure)


def _refusal(answer: bytes) -> str:
    """The reason in the body of a refusal, in OpenAI's form if it has that."""
    try:
        body = json.loads(answer)
    except ValueError:
        return answer[:300].decode(errors="replace")
    return _reason(body.get("error", body)) if isinstance(body, dict) else str(body)


class Client:
    """Sends requests to one server, over as many connections as it takes."""

    def __init__(self, server: Server) -> None:
        """Prepare connections; none is opened yet."""
        self._server = server
        key = server.api_key
        self._http = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEPALIVE_S),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=None,  # noqa: S113 (the whole answer has one, below)
            trust_env=False,  # a proxy would be measured along
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def send(self, request: Request, start: float, scheduled_s: float) -> Timeline:
        """Send a request now and follow its stream; failures are part of the result.

        Args:
            request: what to send.
            start: the load's beginning on the clock `time.perf_counter`.
            scheduled_s: when the request was to arrive, in seconds after `start`.
        """
        sent_s = time.perf_counter() - start
        stream = _Stream()
        failure: _Failure | None = None
        try:
            await asyncio.wait_for(self._follow(request, stream), self._server.timeout_s)
        except _Failure as error:
            failure = error
        except asyncio.TimeoutError:
            failure = _Failure("timeout", f"no end within {self._server.timeout_s:g} s")
        end_s = time.perf_counter() - start
        usage = stream.usage
        return Timeline(
            index=request.index,
            target=request.target,
            scheduled_s=scheduled_s,
            sent_s=sent_s,
            end_s=end_s,
            chunk_s=tuple(moment - start for moment in stream.times),
            prompt_tokens=usage.get("prompt_tokens") or request.sizes.prompt,
            wanted_tokens=request.sizes.output,
            usage_tokens=usage.get("completion_tokens") or None,
            error=failure.kind if failure else None,
            detail=failure.detail if failure else "",
        )

    async def _follow(self, request: Request, stream: _Stream) -> None:
        answered = False
        events = EventStream()
        try:
            async with self._http.stream("POST", self._server.address, json=self._server.body(request)) as answer:
                answered = True
                if answer.status_code != 200:
                    raise _Failure(f"http {answer.status_code}", _refusal(await answer.aread()))
                kind = answer.headers.get("content-type", "")
                if not kind.startswith("text/event-stream"):
                    raise _Failure("no stream", f"the answer is {kind or 'of no type'}, not text/event-stream")
                async for piece in answer.aiter_bytes():
                    now = time.perf_counter()
                    for event in events.feed(piece):
                        stream.take(event, now)
        except httpx.ConnectError as error:
            raise _Failure("no connection", str(error)) from error
        except (httpx.HTTPError, OSError) as error:
            kind = "broken stream" if answered else "no answer"
            raise _Failure(kind, f"{type(error).__name__}: {error}") from error
        if not stream.finished:
            raise _Failure("broken stream", "it ended without a finish reason or [DONE]")
        if not stream.times:
            raise _Failure("no text", "the stream ended before any text")
