"""Calls and results of tools in a conversation, as a chat template takes them.

Templates differ: some know nothing of tools, some insist on short ids, some take arguments as texts, and some look for
calls only where a message has no content.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flextron.generation.templates import TemplateError
from flextron.generation.tools import ToolFormat, tool_format
from flextron.serving.errors import ApiError

__all__ = ["SHORT_ID", "as_read", "with_tools"]

SHORT_ID = 9
"""Letters and digits of ids, where templates insist on short ones."""
_MARK = "flextron_call_mark"
_CODE = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)


def as_read(
    messages: Sequence[Mapping[str, Any]], render: Callable[[Sequence[Mapping[str, Any]]], str]
) -> Sequence[Mapping[str, Any]]:
    """Messages in the form in which a template writes their calls.

    Templates differ: most take arguments as objects, some as texts, and some look for calls only where there is no
    content. What a template passes over would be missing in the prompt, so a mark is looked for in what it writes.

    Raises:
        TemplateError: the template takes no form of them.
        ApiError: the template leaves calls out.
    """
    failed: TemplateError | None = None
    for has_text, has_content in ((False, True), (False, False), (True, True), (True, False)):
        form = [_in_form(message, has_text=has_text, has_content=has_content) for message in messages]
        try:
            text = render([_marked(message) for message in form])
        except TemplateError as error:
            failed = failed or error
            continue
        if text.count(_MARK) >= sum(len(message.get("tool_calls", ())) for message in form):
            return form
    if failed is not None:
        raise failed
    message = "the model's chat template leaves out tool_calls; tell the calls in texts instead"
    raise ApiError(400, message, param="messages", code="unsupported_value")


def _in_form(message: Mapping[str, Any], *, has_text: bool, has_content: bool) -> dict[str, Any]:
    found = dict(message)
    if "tool_calls" not in found:
        return found
    if not has_content:
        found["content"] = found["content"] or None
    if has_text:
        found["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _as_text(call["function"]["arguments"])}}
            for call in found["tool_calls"]
        ]
    return found


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if calls is None:
        return dict(message)
    return {**message, "tool_calls": [{**c, "function": {**c["function"], "name": _MARK}} for c in calls]}


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], template: str
) -> list[Mapping[str, Any]]:
    """A conversation as the template takes it.

    A template that knows nothing of tools gets them, calls and results in texts; one that insists on short ids gets
    short ones.
    """
    layout = tool_format(template)
    if _reads_tools(template):
        return [_with_short_ids(message) for message in messages] if layout.has_short_ids else list(messages)
    told = [_told(message, layout) for message in messages]
    if not tools:
        return told
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = f'{layout.begin}NAME{layout.middle}{{"ARGUMENT": "VALUE"}}{layout.end}'
    text = f"You may call these functions:\n{listed}\nA call is written like this:\n{example}"
    if told[0]["role"] == "system":
        return [{**told[0], "content": f"{told[0]['content']}\n\n{text}"}, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def _with_short_ids(message: Mapping[str, Any]) -> Mapping[str, Any]:
    found = dict(message)
    if "tool_call_id" in found:
        found["tool_call_id"] = _short_id(found["tool_call_id"])
    if "tool_calls" in found:
        found["tool_calls"] = [{**call, "id": _short_id(call["id"])} for call in found["tool_calls"]]
    return found


def _short_id(given: str) -> str:
    """The id itself where it has nine letters and digits, else nine of its digest: equal ids stay equal."""
    is_short = len(given) == SHORT_ID and given.isascii() and given.isalnum()
    return given if is_short else hashlib.sha256(given.encode(errors="surrogatepass")).hexdigest()[:SHORT_ID]


def _reads_tools(template: str) -> bool:
    """Whether a template has a variable of that name; texts in it do not count."""
    return any(re.search(r"\btools\b", _STRING.sub("", code)) for code in _CODE.findall(template))


def _told(message: Mapping[str, Any], layout: ToolFormat) -> Mapping[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = (call["function"] for call in message["tool_calls"])
    texts = [layout.begin + c["name"] + layout.middle + json.dumps(c["arguments"]) + layout.end for c in calls]
    return {"role": message["role"], "content": "\n".join(filter(None, [message["content"], *texts]))}
