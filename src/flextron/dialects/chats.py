"""What other protocols share: their body becomes a chat's, and the chat's answer is told again in their words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from pydantic import ValidationError
from starlette.responses import JSONResponse, Response, StreamingResponse

from flextron.protocols.bodies import ChatBody
from flextron.protocols.chat import chat_prompt
from flextron.serving.errors import ApiError, invalid_body
from flextron.serving.service import Service

__all__ = ["as_chat", "check_parts", "count", "event", "function_tool", "retold", "text_of"]


class _Text(Protocol):
    text: str


def as_chat(body: Mapping[str, Any]) -> ChatBody:
    """The body of a chat.

    Raises:
        ApiError: it is none.
    """
    try:
        return ChatBody.model_validate(body)
    except ValidationError as error:
        raise invalid_body(error) from error


def function_tool(name: str, description: str | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """A chat's entry of `tools`."""
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def check_parts(content: Any, at: str, known: Collection[str]) -> None:
    """Refuse a part of a message by its type, which a union of types cannot name.

    Raises:
        ApiError: there is a part that the server does not read.
    """
    for i, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind not in known:
            param = f"{at}.{i}"
            message = f"{param} is of type {kind[:50]}, which this server does not read; leave it out"
            raise ApiError(400, message, param=param, code="unsupported_content_type")


def text_of(content: str | Sequence[_Text]) -> str:
    """The text of a message, whole or in parts."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


async def count(service: Service, model: str, body: ChatBody) -> int:
    """Number of tokens of a conversation.

    Raises:
        ApiError: the model is unknown, or its chat template does not take the messages.
    """
    service.choose(model, None)
    return len(await chat_prompt(service, body))


def retold(
    answer: Response,
    whole: Callable[[dict[str, Any]], dict[str, Any]],
    events: Callable[[AsyncIterator[dict[str, Any]]], AsyncIterator[str]],
) -> Response:
    """A chat's answer in another protocol.

    Args:
        answer: the chat's.
        whole: makes an answer in one piece of the chat's.
        events: makes events of the chat's chunks.
    """
    if isinstance(answer, StreamingResponse):
        answer.body_iterator = events(_chunks(answer.body_iterator))  # type: ignore[arg-type]
        return answer
    if answer.status_code != 200:
        return answer
    return JSONResponse(whole(json.loads(bytes(answer.body))))


async def _chunks(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        text = line.removeprefix("data: ").rstrip()
        if text != "[DONE]":
            yield json.loads(text)


def event(kind: str, fields: Mapping[str, Any]) -> str:
    """A server-sent event that names its kind twice."""
    data = json.dumps({"type": kind, **fields}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n"
