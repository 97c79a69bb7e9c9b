"""Bodies of Anthropic's `/v1/messages`, and what they are as bodies of a chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from flextron.dialects.chats import as_chat, check_parts, function_tool, text_of
from flextron.protocols.bodies import ChatBody
from flextron.protocols.sampling import RequestBody, StrictBody

__all__ = ["CountBody", "MessagesBody"]


class TextBlock(StrictBody):
    """A piece of a message."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    citations: list[Any] | None = None


class UseBlock(StrictBody):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None
    caller: dict[str, Any] | None = None


class ResultBlock(StrictBody):
    """What a tool gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """The result as the model reads it, failures named as such."""
        return ("Error: " if self.is_error else "") + text_of(self.content or "")


Block = Annotated[TextBlock | UseBlock | ResultBlock, Field(discriminator="type")]


def _check_blocks(messages: Any) -> Any:
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        content, at = message.get("content") if isinstance(message, dict) else None, f"messages.{i}.content"
        check_parts(content, at, ("text", "tool_use", "tool_result"))
        for j, block in enumerate(content if isinstance(content, list) else ()):
            check_parts(block.get("content") if isinstance(block, dict) else None, f"{at}.{j}.content", ("text",))
    return messages


class MessageIn(StrictBody):
    """A message."""

    role: Literal["user", "assistant"]
    content: str | list[Block]

    @property
    def is_text(self) -> bool:
        """Whether it holds text alone."""
        return isinstance(self.content, str) or all(isinstance(block, TextBlock) for block in self.content)


class ToolIn(StrictBody):
    """A function that may be called."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: dict[str, Any] | None = None
    strict: bool | None = None
    """Arguments follow the schema in any case."""
    eager_input_streaming: bool | None = None
    """Arguments are streamed as they come in any case."""
    defer_loading: Literal[False] | None = None


class OutputFormat(StrictBody):
    """The schema of an answer."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(StrictBody):
    """What an answer is like; `effort` has no meaning here."""

    effort: None = None
    format: OutputFormat | None = None


class ToolChoiceIn(StrictBody):
    """Which function is called, if any."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class MessagesBody(RequestBody):
    """Body of `/v1/messages`."""

    endpoint, prompt_key = "messages", "messages"

    model: str
    messages: Annotated[list[MessageIn], Field(min_length=1), BeforeValidator(_check_blocks)]
    max_tokens: Annotated[int, Field(ge=1)]
    system: str | list[TextBlock] | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    tools: list[ToolIn] | None = None
    tool_choice: ToolChoiceIn | None = None
    output_config: OutputConfig | None = None
    flextron: dict[str, Any] | None = None

    def to_chat(self) -> ChatBody:
        """The same as a chat.

        Raises:
            ApiError: it is none.
        """
        asked = self.tool_choice
        choice: Any = None if asked is None else {"auto": "auto", "any": "required", "none": "none"}.get(asked.type)
        if asked is not None and asked.type == "tool":
            choice = {"type": "function", "function": {"name": asked.name}}
        single = asked is not None and asked.disable_parallel_tool_use
        form = None if self.output_config is None else self.output_config.format
        last = self.messages[-1]
        chat: dict[str, Any] = {
            "model": self.model,
            "messages": list(self._messages()),
            "max_completion_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stream": self.stream,
            # the first event tells the number of the prompt's tokens
            "stream_options": {"include_usage": True, "continuous_usage_stats": True} if self.stream else None,
            "tools": [function_tool(t.name, t.description, t.input_schema) for t in self.tools or ()] or None,
            "tool_choice": choice,
            "parallel_tool_calls": False if single else None,
            "response_format": None
            if form is None
            else {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.schema_}},
            # an answer goes on with what the request begins
            "continue_final_message": last.role == "assistant" and last.is_text,
            "flextron": self.flextron,
        }
        return as_chat(chat)

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.system:
            yield {"role": "system", "content": text_of(self.system)}
        for message in self.messages:
            if isinstance(message.content, str):
                yield {"role": message.role, "content": message.content}
                continue
            for block in message.content:
                if isinstance(block, ResultBlock):
                    yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text}
            text = text_of([block for block in message.content if isinstance(block, TextBlock)])
            calls = [_call(block) for block in message.content if isinstance(block, UseBlock)]
            if calls:
                yield {"role": message.role, "content": text, "tool_calls": calls}
            elif text or not any(isinstance(block, ResultBlock) for block in message.content):
                yield {"role": message.role, "content": text}


class CountBody(MessagesBody):
    """Body of `/v1/messages/count_tokens`: the same without an answer."""

    max_tokens: Annotated[int, Field(ge=1)] = 1


def _call(block: UseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input)}
    return {"id": block.id, "type": "function", "function": function}
