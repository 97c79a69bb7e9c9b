"""`/v1/responses`: OpenAI's newer protocol, without state; a chat's answer in its words, whole or event by event."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flextron.dialects.chats import count, event, retold
from flextron.dialects.responses_body import ResponsesBody
from flextron.protocols.chat import chat
from flextron.serving.service import Service

__all__ = ["input_tokens", "responses"]


async def responses(request: Request, service: Service, body: ResponsesBody) -> Response:
    """Answer an input.

    Raises:
        ApiError: the request cannot be answered.
    """
    answer = await chat(request, service, body.to_chat())
    return retold(answer, partial(_whole, body), partial(_events, body))


async def input_tokens(request: Request, service: Service, body: ResponsesBody) -> Response:
    """Number of tokens of an input.

    Raises:
        ApiError: the model is unknown, or its chat template does not take the input.
    """
    num_tokens = await count(service, body.model, body.to_chat())
    return JSONResponse({"object": "response.input_tokens", "input_tokens": num_tokens})


def _whole(body: ResponsesBody, said: Mapping[str, Any]) -> dict[str, Any]:
    """An answer in one piece out of a chat's."""
    choice = said["choices"][0]
    growing = _Growing(body, said["flextron"])
    message = choice["message"]
    calls = [{"index": i, **call} for i, call in enumerate(message.get("tool_calls", ()))]
    list(growing.take({"content": message["content"], "tool_calls": calls}))
    list(growing.close_item(choice["finish_reason"]))
    return growing.response(choice["finish_reason"], said["usage"])


async def _events(body: ResponsesBody, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Events of an answer out of a chat's."""
    growing: _Growing | None = None
    reason, usage, number = "stop", None, 0

    def written(kind: str, fields: Mapping[str, Any]) -> str:
        nonlocal number
        number += 1
        return event(kind, {"sequence_number": number - 1, **fields})

    async for said in chunks:
        if "error" in said:
            # an event's type is its kind, and that of the error has no place
            yield written("error", {k: v for k, v in said["error"].items() if k != "type"})
            return
        if growing is None:
            growing = _Growing(body, said["flextron"])
            for kind in ("response.created", "response.in_progress"):
                yield written(kind, {"response": growing.response(None, None)})
        elif "flextron" in said:
            growing.report = said["flextron"]
        usage = said.get("usage") or usage
        for choice in said["choices"]:
            reason = choice["finish_reason"] or reason
            for kind, fields in growing.take(choice["delta"]):
                yield written(kind, fields)
    assert growing is not None
    for kind, fields in growing.close_item(reason):
        yield written(kind, fields)
    final = growing.response(reason, usage)
    yield written(f"response.{final['status']}", {"response": final})


_Event = tuple[str, dict[str, Any]]


class _Growing:
    """The items of an answer, while it grows."""

    def __init__(self, body: ResponsesBody, report: Mapping[str, Any]) -> None:
        self._body, self.report = body, report
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None

    def take(self, delta: Mapping[str, Any]) -> Iterator[_Event]:
        """What a delta of a chat adds."""
        if delta.get("content"):
            yield from self._text(delta["content"])
        for call in delta.get("tool_calls", ()):
            yield from self._call(call)

    def _text(self, text: str) -> Iterator[_Event]:
        if self._open is None or self._open["type"] != "message":
            item = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "status": "in_progress", "role": "assistant"}
            yield from self._begin({**item, "content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._item["content"].append(part)
            yield "response.content_part.added", {**self._place, "content_index": 0, "part": dict(part)}
        self._item["content"][0]["text"] += text
        yield "response.output_text.delta", {**self._place, "content_index": 0, "delta": text, "logprobs": []}

    def _call(self, call: Mapping[str, Any]) -> Iterator[_Event]:
        function = call["function"]
        if "id" in call:
            item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call["id"]}
            yield from self._begin({**item, "name": function["name"], "arguments": "", "status": "in_progress"})
        if function["arguments"]:
            self._item["arguments"] += function["arguments"]
            yield "response.function_call_arguments.delta", {**self._place, "delta": function["arguments"]}

    @property
    def _item(self) -> dict[str, Any]:
        assert self._open is not None
        return self._open

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": len(self._output) - 1}

    def _begin(self, item: dict[str, Any]) -> Iterator[_Event]:
        yield from self.close_item()
        self._open = item
        self._output.append(item)
        added = json.loads(json.dumps(item))
        yield "response.output_item.added", {"output_index": len(self._output) - 1, "item": added}

    def close_item(self, reason: str = "stop") -> Iterator[_Event]:
        """End what is open, for a chat's reason."""
        if self._open is None:
            return
        item = self._open
        item["status"] = "incomplete" if reason == "length" else "completed"
        if item["type"] == "message":
            part = item["content"][0]
            text = {"text": part["text"], "logprobs": []}
            yield "response.output_text.done", {**self._place, "content_index": 0, **text}
            yield "response.content_part.done", {**self._place, "content_index": 0, "part": part}
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", {**self._place, **done}
        yield "response.output_item.done", {"output_index": len(self._output) - 1, "item": item}
        self._open = None

    def response(self, reason: str | None, usage: Mapping[str, Any] | None) -> dict[str, Any]:
        """The whole object; without a reason it has just begun."""
        body = self._body.model_dump(by_alias=True)
        is_cut = reason == "length"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if reason is None else "incomplete" if is_cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body["instructions"],
            "max_output_tokens": body["max_output_tokens"],
            "model": body["model"],
            "output": self._output,
            "parallel_tool_calls": body["parallel_tool_calls"] is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body["temperature"],
            "text": body["text"] or {"format": {"type": "text"}},
            "tool_choice": body["tool_choice"] or "auto",
            "tools": body["tools"] or [],
            "top_p": body["top_p"],
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "metadata": body["metadata"] or {},
            "flextron": self.report,
        }


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
