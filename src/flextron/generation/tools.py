"""Calls of tools: how models write them, the grammar of such answers, and reading them back while they grow.

A format is data: the texts before a call's name, between name and arguments, and behind them. Answers with tools follow
a grammar of that layout, so what is read back is never half right, unless the answer ended too early.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flextron.generation.constraints import JSON_STYLE

__all__ = ["Call", "Content", "More", "Tool", "ToolCallReader", "ToolFormat", "tool_format", "tool_grammar"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments, an object."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFormat:
    """How a family of models writes calls."""

    trigger: str
    """Begins a call, and nothing else does."""
    begin: str
    """Stands before the name; it begins with the trigger."""
    middle: str
    """Stands between name and arguments."""
    end: str
    """Stands behind the arguments."""
    only_first: bool = False
    """Whether an answer is either text or calls, as the trigger may stand in a text."""


_HERMES = ToolFormat(
    trigger="<tool_call>", begin='<tool_call>\n{"name": "', middle='", "arguments": ', end="}\n</tool_call>"
)
"""Qwen's, Hermes', SmolLM's, and ours where a template knows nothing of tools."""
_LLAMA = ToolFormat(trigger='{"', begin='{"name": "', middle='", "parameters": ', end="}", only_first=True)
"""Llama's, since 3.1."""


def tool_format(template: str) -> ToolFormat:
    """The format that a chat template teaches."""
    return _LLAMA if '"parameters": ' in template and "<tool_call>" not in template else _HERMES


def tool_grammar(
    tools: Sequence[Tool],
    layout: ToolFormat,
    *,
    must_call: bool,
    parallel: bool,
    answer: Mapping[str, Any] | None = None,
) -> str:
    """A grammar of answers, in Lark's notation.

    Args:
        tools: those that may be called.
        layout: how a call is written.
        must_call: whether the answer is calls alone.
        parallel: whether there may be several.
        answer: JSON schema of answers without calls; by default they are texts.
    """
    opening = len(layout.trigger)
    names = " | ".join(f"tool_{i}" for i in range(len(tools)))
    rules = [f"rest: {names}"]
    for i, tool in enumerate(tools):
        head = layout.begin[opening:] + tool.name + layout.middle
        rules.append(f"tool_{i}: {json.dumps(head)} {_json(tool.parameters)} {json.dumps(layout.end)}")
    call = f"{json.dumps(layout.trigger)} rest"
    calls = f'{call} ("\\n" {call})*' if parallel and not layout.only_first else call
    if must_call:
        return "\n".join([f"start: {calls}", *rules])
    if answer is not None:
        return "\n".join([f"start: answer | {calls}", f"answer: {_json(answer)}", *rules])
    if layout.only_first:
        return "\n".join([f"start: {call} | TEXT?", "TEXT: /[^{](.|\\n)*/", *rules])
    # after the last call that may come its trigger would be a text like any other
    found = ["start: call* TEXT" if parallel else "start: TEXT | call", "TEXT: /(.|\\n)*/", "call: head rest"]
    return "\n".join([*found, f"head[lazy]: TEXT {json.dumps(layout.trigger)}", *rules])


def _json(schema: Mapping[str, Any]) -> str:
    """A schema within a grammar."""
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}"


@dataclass(frozen=True, slots=True)
class Content:
    """Text beside calls."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class More:
    """More of a call's arguments."""

    index: int
    arguments: str


@dataclass(slots=True)
class ToolCallReader:
    """Reads the calls out of a growing text."""

    layout: ToolFormat
    num_calls: int = 0
    _held: str = ""
    """What is not certain yet."""
    _part: str = "content"
    _depth: int = 0
    _in_string: bool = False
    _is_escaped: bool = False
    _found: list[Content | Call | More] = field(default_factory=list)

    def push(self, text: str) -> list[Content | Call | More]:
        """Add text; what it tells."""
        self._held += text
        while self._step():
            pass
        found, self._found = self._found, []
        return found

    def finish(self) -> list[Content | Call | More]:
        """What was held back, now that nothing follows."""
        rest, self._held = self._held, ""
        if self._part == "content" and rest and (rest.strip() or not self.num_calls):
            return [Content(rest)]
        return []

    def _step(self) -> bool:
        """Read one part of the layout; False if that needs more text."""
        if self._part == "content":
            return self._content()
        if self._part == "name":
            name, found, rest = self._held.partition(self.layout.middle)
            if not found:
                return False
            self._found.append(Call(self.num_calls, name))
            self._held, self._part, self.num_calls = rest, "arguments", self.num_calls + 1
            return True
        if self._part == "arguments":
            return self._arguments()
        if len(self._held) < len(self.layout.end):
            return False
        self._held, self._part = self._held.removeprefix(self.layout.end), "content"
        return True

    def _content(self) -> bool:
        text, found, rest = self._held.partition(self.layout.begin)
        if found:
            if text.strip():
                self._found.append(Content(text.rstrip()))
            self._held, self._part = rest, "name"
            return True
        # what may begin a call, and space that may stand before one
        keep = next((n for n in range(len(self.layout.begin) - 1, 0, -1) if text.endswith(self.layout.begin[:n])), 0)
        certain = text[: len(text) - keep].rstrip()
        if certain:
            self._found.append(Content(certain))
            self._held = text[len(certain) :]
        return False

    def _arguments(self) -> bool:
        """Give out arguments up to the end of their object."""
        for i, sign in enumerate(self._held):
            if self._in_string:
                self._in_string = self._is_escaped or sign != '"'
                self._is_escaped = sign == "\\" and not self._is_escaped
            elif sign == '"':
                self._in_string = True
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                if not self._depth:
                    self._found.append(More(self.num_calls - 1, self._held[: i + 1]))
                    self._held, self._part = self._held[i + 1 :], "end"
                    return True
        if self._held:
            self._found.append(More(self.num_calls - 1, self._held))
            self._held = ""
        return False
