"""Anthropic's `/v1/messages`: a chat's answer in its words, whole or event by event."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flextron.protocols.chat import chat
from flextron.protocols.dialects.chats import event, retold
from flextron.protocols.dialects.messages_body import MessagesBody
from flextron.serving.errors import ApiError
from flextron.serving.service import Service

__all__ = ["messages"]

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}


async def messages(request: Request, service: Service, body: MessagesBody) -> Response:
    """Answer messages."""
    try:
        answer = await chat(request, service, body.to_chat())
    except ApiError as error:
        told = error.body()["error"] | {"type": _ERRORS.get(error.status, "api_error")}
        return JSONResponse({"type": "error", "error": told}, error.status, error.headers)
    return retold(answer, partial(_whole, body), partial(_events, body))


def _whole(body: MessagesBody, said: Mapping[str, Any]) -> dict[str, Any]:
    """An answer in one piece out of a chat's."""
    choice = said["choices"][0]
    message = choice["message"]
    content: list[dict[str, Any]] = [{"type": "text", "text": message["content"]}] if message["content"] else []
    for call in message.get("tool_calls", ()):
        content.append({**_use(call), "input": _arguments(call["function"]["arguments"])})
    whole = _message(body, said["usage"]) | {"content": content, "stop_reason": _REASONS[choice["finish_reason"]]}
    return whole | {"flextron": said["flextron"]}


def _message(body: MessagesBody, usage: Mapping[str, Any] | None) -> dict[str, Any]:
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": body.model}
    return head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(usage)}


def _use(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}


def _arguments(text: str) -> Any:
    """A call's arguments; nothing if the answer ended within them."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _usage(usage: Mapping[str, Any] | None) -> dict[str, Any]:
    if usage is None:
        return {"input_tokens": 0, "output_tokens": 0}
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    counts = {"input_tokens": usage["prompt_tokens"] - cached, "cache_read_input_tokens": cached}
    return counts | {"output_tokens": usage["completion_tokens"]}


async def _events(body: MessagesBody, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Events of an answer out of a chat's; the counts of tokens come at the end."""
    blocks = _Blocks()
    reason, usage, has_begun = "stop", None, False
    async for said in chunks:
        if "error" in said:
            yield event("error", {"error": {"type": "api_error", "message": said["error"]["message"]}})
            return
        if not has_begun:
            has_begun = True
            yield event("message_start", {"message": _message(body, None) | {"flextron": said["flextron"]}})
        usage = said.get("usage") or usage
        for choice in said["choices"]:
            reason = choice["finish_reason"] or reason
            for kind, fields in blocks.take(choice["delta"]):
                yield event(kind, fields)
    for kind, fields in blocks.close():
        yield event(kind, fields)
    end = {"stop_reason": _REASONS[reason], "stop_sequence": None}
    yield event("message_delta", {"delta": end, "usage": _usage(usage)})
    yield event("message_stop", {})


class _Blocks:
    """The blocks of an answer, while it grows."""

    def __init__(self) -> None:
        self._index, self._open = -1, ""

    def take(self, delta: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """What a delta of a chat adds."""
        if delta.get("content"):
            if self._open != "text":
                yield from self._begin({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": delta["content"]})
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                yield from self._begin(_use(call))
            if call["function"]["arguments"]:
                yield self._delta({"type": "input_json_delta", "partial_json": call["function"]["arguments"]})

    def close(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """End what is open."""
        if self._open:
            yield "content_block_stop", {"index": self._index}
        self._open = ""

    def _begin(self, block: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self.close()
        self._index, self._open = self._index + 1, block["type"]
        yield "content_block_start", {"index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "content_block_delta", {"index": self._index, "delta": delta}
