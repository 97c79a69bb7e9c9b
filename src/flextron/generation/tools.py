"""Calls of tools: how models write them, the grammar of such answers, and reading them back while they grow.

A format is data: the texts before a call's name, between name and arguments, and behind them. Answers with tools follow
a grammar of that layout, so what is read back is never half right, unless the answer ended too early.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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
    """Begins the first call, and nothing else does."""
    opening: str = ""
    """Stands before the first call."""
    begin: str
    """Stands before the name; opening and this begin with the trigger."""
    id_mark: str | None = None
    """Stands between the name and the call's id, where a model may write one."""
    middle: str
    """Stands between name, or id, and arguments."""
    end: str
    """Stands behind the arguments."""
    between: str = "\n"
    """Stands between two calls."""
    closing: str = ""
    """Stands behind the last call."""
    place: Literal["anywhere", "last", "alone"] = "anywhere"
    """Where calls may stand in a text. If alone, there is one, as its trigger may stand in a text."""
    has_short_ids: bool = False
    """Whether templates insist on ids of nine letters and digits."""


_HERMES = ToolFormat(
    trigger="<tool_call>", begin='<tool_call>\n{"name": "', middle='", "arguments": ', end="}\n</tool_call>"
)
"""Qwen's, Hermes', SmolLM's, and ours where a template knows nothing of tools."""
_LLAMA = ToolFormat(trigger='{"', begin='{"name": "', middle='", "parameters": ', end="}", place="alone")
"""Llama's, since 3.1."""
_MISTRAL = "[TOOL_CALLS]"
_MISTRAL_LIST = ToolFormat(
    trigger=_MISTRAL,
    opening=f"{_MISTRAL} [",
    begin='{"name": "',
    middle='", "arguments": ',
    end="}",
    between=", ",
    closing="]",
    place="last",
    has_short_ids=True,
)
"""Mistral's, of tokenizers 3 to 7."""
_MISTRAL_ARGS = ToolFormat(
    trigger=_MISTRAL,
    begin=_MISTRAL,
    id_mark="[CALL_ID]",
    middle="[ARGS]",
    end="",
    between="",
    place="last",
    has_short_ids=True,
)
"""Mistral's, of tokenizers since 11."""


def tool_format(template: str) -> ToolFormat:
    """The format that a chat template teaches."""
    if _MISTRAL in template:
        if "[ARGS]" in template:
            return _MISTRAL_ARGS if "[CALL_ID]" in template else replace(_MISTRAL_ARGS, id_mark=None)
        return replace(_MISTRAL_LIST, opening=f"{_MISTRAL}[") if f"{_MISTRAL}[" in template else _MISTRAL_LIST
    return _LLAMA if '"parameters": ' in template and "<tool_call>" not in template else _HERMES


def tool_grammar(
    tools: Sequence[Tool],
    layout: ToolFormat,
    *,
    must_call: bool,
    parallel: bool,
    answer: Mapping[str, Any] | None = None,
    special: Mapping[str, int] | None = None,
) -> str:
    """A grammar of answers, in Lark's notation.

    Args:
        tools: those that may be called.
        layout: how a call is written.
        must_call: whether the answer is calls alone.
        parallel: whether there may be several.
        answer: JSON schema of answers without calls; by default they are texts.
        special: ids of the tokenizer's special tokens, which no text stands for.
    """
    marks = {text: i for text, i in (special or {}).items() if text in "".join(_marks(layout))}
    names = " | ".join(f"tool_{i}" for i in range(len(tools)))
    rules = [f"rest: {names}"]
    for i, tool in enumerate(tools):
        name = [_text(tool.name, marks)]
        if layout.id_mark is not None:
            name.append(f"({_text(layout.id_mark, marks)} /[a-zA-Z0-9]{{9}}/)?")
        rest = _joined(*name, _text(layout.middle, marks), _json(tool.parameters), _text(layout.end, marks))
        rules.append(f"tool_{i}: {rest}")
    trigger = _text(layout.trigger, marks)
    one = _joined(_text((layout.opening + layout.begin).removeprefix(layout.trigger), marks), "rest")
    more = f"({_text(layout.between + layout.begin, marks)} rest)*" if parallel and layout.place != "alone" else ""
    calls = _joined(one, more, _text(layout.closing, marks))
    if must_call:
        return "\n".join([f"start: {trigger} {calls}", *rules])
    if answer is not None:
        return "\n".join([f"start: answer | {trigger} {calls}", f"answer: {_json(answer)}", *rules])
    if layout.place == "alone":
        return "\n".join([f"start: {trigger} {calls} | TEXT?", "TEXT: /[^{](.|\\n)*/", *rules])
    # a special token is in no text, but any other trigger is
    lead = f"lead: TEXT? {trigger}" if layout.trigger in marks else f"lead[lazy]: TEXT {trigger}"
    rules += ["TEXT: /(.|\\n)*/", lead]
    if layout.place == "last":
        return "\n".join([f"start: TEXT? | lead {calls}", *rules])
    # after the last call that may come its trigger would be a text like any other
    start = "start: call* TEXT" if parallel else "start: TEXT | call"
    return "\n".join([start, f"call: lead {one}", *rules])


def _joined(*parts: str) -> str:
    """Parts of a rule, without those that are empty."""
    return " ".join(filter(None, parts))


def _marks(layout: ToolFormat) -> tuple[str, ...]:
    return layout.opening, layout.begin, layout.id_mark or "", layout.middle, layout.end, layout.closing


def _text(text: str, marks: Mapping[str, int]) -> str:
    """A text in a grammar, where special tokens go by their ids."""
    parts = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
    return " ".join(f"<[{marks[part]}]>" if part in marks else json.dumps(part) for part in parts if part)


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
    _part: Literal["content", "name", "arguments", "end", "next"] = "content"
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
            if self.layout.id_mark is not None:
                name = name.partition(self.layout.id_mark)[0]
            self._found.append(Call(self.num_calls, name))
            self._held, self._part, self.num_calls = rest, "arguments", self.num_calls + 1
            return True
        if self._part == "arguments":
            return self._arguments()
        if self._part == "next":
            return self._next()
        if len(self._held) < len(self.layout.end):
            return False
        self._held = self._held.removeprefix(self.layout.end)
        self._part = "next" if self.layout.closing else "content"
        return True

    def _next(self) -> bool:
        """Read what stands behind a call of a list: one more, or the list's end."""
        more = self.layout.between + self.layout.begin
        if self._held.startswith(more):
            self._held, self._part = self._held.removeprefix(more), "name"
            return True
        if self._held.startswith(self.layout.closing):
            self._held, self._part = self._held.removeprefix(self.layout.closing), "content"
            return True
        return False

    def _content(self) -> bool:
        begin = self.layout.opening + self.layout.begin
        text, found, rest = self._held.partition(begin)
        if found:
            if text.strip():
                self._found.append(Content(text.rstrip()))
            self._held, self._part = rest, "name"
            return True
        # what may begin a call, and space that may stand before one
        keep = next((n for n in range(len(begin) - 1, 0, -1) if text.endswith(begin[:n])), 0)
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
