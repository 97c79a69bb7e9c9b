"""Messages of a conversation: what of them a chat template can be given, and what is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flextron.protocols.keys import is_neutral, unknown_key, unsupported
from flextron.serving.errors import ApiError

__all__ = ["check_messages"]

_SERVED = frozenset({"role", "content", "name", "tool_calls", "tool_call_id"})
_IGNORED = frozenset({"id", "annotations", "cache_control", "weight"})
"""They change no answer."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "function_call": (),
    "refusal": ("",),
    "audio": (),
    "images": ([],),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "thinking": ("",),
    "prefix": (False,),
    "partial": (False,),
}
"""They change what the model reads, but for these values and null."""


def check_messages(messages: Any) -> Any:
    """The messages with only those keys that are served; what is no message is left to the body's own checks.

    Raises:
        ApiError: something that would change the answer cannot be served, or there is no text.
    """
    if not isinstance(messages, list):
        return messages
    return [_checked(m, f"messages.{i}") if isinstance(m, Mapping) else m for i, m in enumerate(messages)]


def _checked(message: Mapping[str, Any], at: str) -> dict[str, Any]:
    for name, value in message.items():
        if name in _SERVED or name in _IGNORED:
            continue
        if name not in _NEUTRAL:
            raise unknown_key(f"{at}.{name}")
        if value is not None and not is_neutral(value, _NEUTRAL[name]):
            raise unsupported(f"{at}.{name}")
    served = {name: value for name, value in message.items() if name in _SERVED}
    if served.get("tool_calls") and served.get("content") is None:
        return served | {"content": ""}
    return served | {"content": _content(message.get("content"), f"{at}.content")}


def _content(content: Any, at: str) -> Any:
    if content is None or content == []:
        raise ApiError(400, f"{at} is missing; give a text", param=at, code="missing_required_parameter")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{at} must be a text, or a list of parts", param=at, code="invalid_type")
    return [_part(part, f"{at}.{i}") for i, part in enumerate(content)]


def _part(part: Any, at: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise ApiError(400, f"{at} must be a part with a type", param=at, code="invalid_type")
    if kind != "text":
        message = f"{at} is of type {kind[:50]}, and this server reads texts only; leave it out"
        raise ApiError(400, message, param=at, code="unsupported_content_type")
    if not isinstance(part.get("text"), str):
        raise ApiError(400, f"{at}.text must be a text", param=f"{at}.text", code="invalid_type")
    for name in part:
        if name not in ("type", "text", "cache_control", "annotations"):
            raise unknown_key(f"{at}.{name}")
    return {"type": kind, "text": part["text"]}
