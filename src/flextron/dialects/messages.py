"""Anthropic's `/v1/messages`: a chat's answer in its words, whole or event by event, and refusals in its form."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flextron.dialects.chats import count, event, retold
from flextron.dialects.messages_body import CountBody, MessagesBody
from flextron.protocols.chat import chat
from flextron.serving.errors import ApiError
from flextron.serving.service import Service

__all__ = ["count_tokens", "messages", "refusal"]

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def refusal(error: ApiError) -> dict[str, Any]:
    """A refusal in Anthropic's form, with OpenAI's `param` and `code` beside it."""
    told = error.body()["error"] | {"type": _ERRORS.get(error.status, "api_error")}
    return {"type": "error", "error": told}


async def messages(request: Request, service: Service, body: MessagesBody) -> Response:
    """Answer messages.

    Raises:
        ApiError: the request cannot be answered.
    """
    answer = await chat(request, service, body.to_chat())
    return retold(answer, partial(_whole, body), partial(_events, body))


async def count_tokens(request: Request, service: Service, body: CountBody) -> Response:
    """Number of tokens of messages.

    Raises:
        ApiError: the model is unknown, or its chat template does not take the messages.
    """
    return JSONResponse({"input_tokens": await count(service, body.model, body.to_chat())})


def _whole(body: MessagesBody, said: Mapping[str, Any]) -> dict[str, Any]:
    """An answer in one piece out of a chat's."""
    choice = said["choices"][0]
    message = choice["message"]
    content: list[dict[str, Any]] = [{"type": "text", "text": message["content"]}] if message["content"] else []
    for call in message.get("tool_calls", ()):
        content.append({**_use(call), "input": _arguments(call["function"]["arguments"])})
    return _message(body, said["usage"]) | {"content": content, **_ending(choice), "flextron": said["flextron"]}


def _ending(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Why an answer ended."""
    if isinstance(choice["stop_reason"], str):
        return {"stop_reason": "stop_sequence", "stop_sequence": choice["stop_reason"]}
    return {"stop_reason": _REASONS[choice["finish_reason"]], "stop_sequence": None}


def _message(body: MessagesBody, usage: Mapping[str, Any]) -> dict[str, Any]:
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


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    counts = {"input_tokens": usage["prompt_tokens"] - cached, "cache_read_input_tokens": cached}
    return counts | {"output_tokens": usage["completion_tokens"]}


async def _events(body: MessagesBody, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Events of an answer out of a chat's. What was cached, and the answer's tokens, are told at the end."""
    blocks = _Blocks()
    ending: dict[str, Any] = {}
    usage, has_begun, changed = None, False, dict[str, Any]()
    async for said in chunks:
        if "error" in said:
            yield event("error", {"error": {"type": "api_error", "message": said["error"]["message"]}})
            return
        if not has_begun:
            has_begun = True
            yield event("message_start", {"message": _message(body, said["usage"]) | {"flextron": said["flextron"]}})
        elif "flextron" in said:
            changed = {"flextron": said["flextron"]}
        usage = said["usage"]
        for choice in said["choices"]:
            ending = _ending(choice) if choice["finish_reason"] else ending
            for kind, fields in blocks.take(choice["delta"]):
                yield event(kind, fields)
    for kind, fields in blocks.close():
        yield event(kind, fields)
    assert usage is not None
    yield event("message_delta", {"delta": ending, "usage": _usage(usage), **changed})
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
