"""Tools in OpenAI's words: what a request offers, and answers with calls."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from flextron.generation.tools import Call, Content, More, Tool, ToolCallReader, ToolFormat, tool_format, tool_grammar
from flextron.protocols.sampling import StrictBody
from flextron.protocols.structured.grammars import Asked
from flextron.protocols.structured.history import SHORT_ID
from flextron.serving.errors import ApiError

__all__ = ["Calls", "Reading", "ToolBody", "ToolCallBody", "ToolChoice", "check_choice"]

_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,64}$")]


class Function(StrictBody):
    """A function that may be called."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Arguments follow the schema in any case."""


class ToolBody(StrictBody):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function


class NamedFunction(StrictBody):
    """A function that must be called."""

    name: str


class NamedTool(StrictBody):
    """A `tool_choice` that names a function."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(StrictBody):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedChoice(StrictBody):
    """A `tool_choice` that leaves some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class CalledFunction(StrictBody):
    """A call in the history."""

    name: str
    arguments: str


class ToolCallBody(StrictBody):
    """An entry of `tool_calls` in the history."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def to_template(self) -> dict[str, Any]:
        """What templates expect: arguments as an object where they are one."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


_CHOICES = "'none', 'auto', 'required', a function, or allowed_tools"


def check_choice(given: Any) -> Any:
    """Say what a choice may be, which a union of types cannot."""
    if isinstance(given, str) and given not in ("none", "auto", "required"):
        raise ValueError(f"{given[:50]!r} is none of {_CHOICES}")
    if isinstance(given, dict) and given.get("type") not in ("function", "allowed_tools"):
        raise ValueError(f"type {str(given.get('type'))[:50]!r} is not supported; give {_CHOICES}")
    return given


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedChoice, Field(discriminator="type")],
    BeforeValidator(check_choice),
]
"""What a request says of calls."""


@dataclass(frozen=True, slots=True)
class Calls:
    """How an answer may call tools."""

    layout: ToolFormat
    tools: tuple[Tool, ...]
    must_call: bool
    parallel: bool
    special: Mapping[str, int]
    """Ids of the special tokens."""

    @classmethod
    def of(
        cls,
        tools: Sequence[ToolBody] | None,
        choice: ToolChoice | None,
        parallel: bool | None,
        template: str,
        special: Mapping[str, int],
    ) -> Calls | None:
        """What a request allows; None if it offers no tools.

        Args:
            tools: the request's.
            choice: the request's.
            parallel: whether there may be several calls.
            template: the chat template.
            special: ids of the tokenizer's special tokens.

        Raises:
            ApiError: the choice names a tool that is not there.
        """
        if not tools or choice == "none":
            if not tools and choice not in (None, "none", "auto"):
                raise _wrong_choice("tool_choice needs tools; give some or leave it out")
            return None
        offered = [t.function for t in tools]
        if isinstance(choice, NamedTool | AllowedChoice):
            allowed = [choice] if isinstance(choice, NamedTool) else choice.allowed_tools.tools
            names = {tool.function.name for tool in allowed}
            if missing := names - {f.name for f in offered}:
                raise _wrong_choice(f"tool_choice names {min(missing)[:64]!r}, which is none of the tools")
            offered = [f for f in offered if f.name in names]
        found = tuple(Tool(name=f.name, parameters=f.parameters or {"type": "object"}) for f in offered)
        is_named = isinstance(choice, NamedTool)
        mode = choice.allowed_tools.mode if isinstance(choice, AllowedChoice) else choice
        return cls(
            layout=tool_format(template),
            tools=found,
            must_call=is_named or mode == "required",
            parallel=parallel is not False and not is_named,
            special=special,
        )

    def grammar(self, answer: Asked | None) -> Asked:
        """The grammar of the answer.

        Args:
            answer: what the request names for answers without calls.

        Raises:
            ApiError: that is no JSON schema.
        """
        if answer is not None and not isinstance(answer.given, Mapping):
            message = f"{answer.param} goes with tools only if it is a JSON schema; leave one of them out"
            raise ApiError(400, message, param=answer.param, code="invalid_value")
        text = tool_grammar(
            self.tools,
            self.layout,
            must_call=self.must_call,
            parallel=self.parallel,
            answer=None if answer is None else answer.given,
            special=self.special,
        )
        return Asked("lark", text, "tools")

    def reading(self) -> Reading:
        """For one answer."""
        return Reading(ToolCallReader(self.layout))


def _wrong_choice(message: str) -> ApiError:
    return ApiError(400, message, param="tool_choice", code="invalid_value")


@dataclass(slots=True)
class Reading:
    """Calls of one answer in OpenAI's words."""

    reader: ToolCallReader
    ids: list[str] = field(default_factory=list)

    @property
    def has_calls(self) -> bool:
        """Whether there was any so far."""
        return bool(self.ids)

    def deltas(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """What more text means, as entries of `delta`."""
        found = self.reader.push(text) + (self.reader.finish() if is_last else [])
        return [self._delta(entry) for entry in found]

    def message(self, text: str) -> dict[str, Any]:
        """A whole answer, as parts of `message`."""
        calls: list[dict[str, Any]] = []
        content = ""
        for delta in self.deltas(text, is_last=True):
            content += delta.get("content", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append({name: call[name] for name in ("id", "type", "function")})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        return {"content": content or (None if calls else "")} | ({"tool_calls": calls} if calls else {})

    def _delta(self, entry: Content | Call | More) -> dict[str, Any]:
        if isinstance(entry, Content):
            return {"content": entry.text}
        if isinstance(entry, More):
            return {"tool_calls": [{"index": entry.index, "function": {"arguments": entry.arguments}}]}
        made = uuid.uuid4().hex
        self.ids.append(made[:SHORT_ID] if self.reader.layout.has_short_ids else f"call_{made[:24]}")
        function = {"name": entry.name, "arguments": ""}
        return {"tool_calls": [{"index": entry.index, "id": self.ids[-1], "type": "function", "function": function}]}
