"""Bodies of `/v1/responses`, and what they are as bodies of a chat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from flextron.dialects.chats import as_chat, check_parts, function_tool, text_of
from flextron.protocols.bodies import ChatBody
from flextron.protocols.sampling import RequestBody, SamplingBody, StrictBody
from flextron.protocols.structured.tools import check_choice
from flextron.serving.errors import ApiError

__all__ = ["ResponsesBody"]


class TextPart(StrictBody):
    """A piece of a message, or of an earlier answer, which clients send back as it was."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(StrictBody):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(StrictBody):
    """A call of a tool by an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class ResultItem(StrictBody):
    """What a tool gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]
    id: str | None = None
    status: str | None = None


Item = MessageItem | CallItem | ResultItem


def _check_items(given: Any) -> Any:
    """Name the type of an item that cannot be read, and give messages the type that they may leave out."""
    if not isinstance(given, list):
        return given
    for i, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind not in ("message", "function_call", "function_call_output"):
            message = f"input.{i} is of type {str(kind)[:50]}, which this server does not read; leave it out"
            raise ApiError(400, message, param=f"input.{i}.type", code="unsupported_content_type")
        for name in ("content", "output"):
            check_parts(item.get(name), f"input.{i}.{name}", ("input_text", "output_text", "text"))
    return [{"type": "message", **item} for item in given]


class TextFormat(StrictBody):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(StrictBody):
    """OpenAI's `text`."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class FunctionTool(StrictBody):
    """A function that may be called."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(StrictBody):
    """A function that must be called."""

    type: Literal["function"]
    name: str


class AllowedTools(StrictBody):
    """Some of the tools, and whether one of them must be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedTools, Field(discriminator="type")],
    BeforeValidator(check_choice),
]


class ResponsesBody(SamplingBody, RequestBody):
    """Body of `/v1/responses`; OpenAI's own has fewer ways to draw tokens than the chat's, vLLM's has them all."""

    endpoint, prompt_key = "responses", "input"

    model: str
    input: Annotated[str | list[Annotated[Item, Field(discriminator="type")]], BeforeValidator(_check_items)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    """What the answer repeats."""
    flextron: dict[str, Any] | None = None

    def to_chat(self) -> ChatBody:
        """The same as a chat.

        Raises:
            ApiError: it is none.
        """
        chat: dict[str, Any] = {
            "model": self.model,
            "messages": list(self._messages()),
            "max_completion_tokens": self.max_output_tokens,
            **self.model_dump(include=set(SamplingBody.model_fields)),
            "stream": self.stream,
            "stream_options": {"include_usage": True} if self.stream else None,
            "response_format": self._format(),
            "tools": [function_tool(t.name, t.description, t.parameters) for t in self.tools or ()] or None,
            "tool_choice": self._choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "flextron": self.flextron,
        }
        return as_chat(chat)

    def _choice(self) -> str | dict[str, Any] | None:
        asked = self.tool_choice
        if isinstance(asked, NamedTool):
            return _named(asked)
        if isinstance(asked, AllowedTools):
            allowed = {"mode": asked.mode, "tools": [_named(tool) for tool in asked.tools]}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        return asked

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.instructions is not None:
            yield {"role": "system", "content": self.instructions}
        items: list[Item] = (
            [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        )
        calls: list[dict[str, Any]] = []
        for item in items:
            if isinstance(item, CallItem):
                function = {"name": item.name, "arguments": item.arguments}
                calls.append({"id": item.call_id, "type": "function", "function": function})
                continue
            if calls:
                yield {"role": "assistant", "content": None, "tool_calls": calls}
                calls = []
            if isinstance(item, ResultItem):
                yield {"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)}
            else:
                yield {"role": item.role, "content": text_of(item.content)}
        if calls:
            yield {"role": "assistant", "content": None, "tool_calls": calls}

    def _format(self) -> dict[str, Any] | None:
        asked = None if self.text is None else self.text.format
        if asked is None or asked.type != "json_schema":
            return None if asked is None else {"type": asked.type}
        return {"type": "json_schema", "json_schema": {"name": asked.name, "schema": asked.schema_}}


def _named(tool: NamedTool) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name}}
