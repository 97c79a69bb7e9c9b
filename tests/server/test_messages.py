"""Messages that cannot be given to a chat template as they are: each is refused as what it is."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.running import Running
from tests.server.test_refusals import assert_refused

USER = {"role": "user", "content": "a"}


def ask(server: Running, *messages: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": messages, "max_tokens": 1}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)


@pytest.mark.parametrize(
    ("message", "param", "code", "said"),
    [
        ({"role": "user"}, "content", "missing_required_parameter", "give a text"),
        ({"role": "user", "content": None}, "content", "missing_required_parameter", "give a text"),
        ({"role": "user", "content": []}, "content", "missing_required_parameter", "give a text"),
        ({"role": "assistant", "content": None}, "content", "missing_required_parameter", "give a text"),
        ({"role": "assistant", "tool_calls": [{"id": "c"}]}, "tool_calls.0.function", "missing_required_parameter", ""),
        ({"role": "assistant", "content": "a", "function_call": {}}, "function_call", "unsupported_parameter", ""),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "b"},
            "reasoning_content",
            "unsupported_parameter",
            "",
        ),
        ({"role": "assistant", "content": "a", "prefix": True}, "prefix", "unsupported_parameter", ""),
        ({"role": "user", "content": "a", "colour": 1}, "colour", "unknown_parameter", ""),
        ({"role": "user", "content": 5}, "content", "invalid_type", "a text"),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, "content", "invalid_type", "list of parts"),
        ({"role": "user", "content": ["a"]}, "content.0", "invalid_type", "part"),
        ({"role": "user", "content": [{"text": "a"}]}, "content.0", "invalid_type", "type"),
        ({"role": "user", "content": [{"type": "text"}]}, "content.0.text", "invalid_type", "text"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}, "content.0.x", "unknown_parameter", ""),
        *(
            (
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "x"}}]},
                "content.1",
                "unsupported_content_type",
                f"of type {kind}",
            )
            for kind in ("image_url", "input_audio", "file", "video_url", "refusal")
        ),
        ({"content": "a"}, "role", "missing_required_parameter", ""),
        ({"role": "robot", "content": "a"}, "role", "invalid_value", "'user'"),
    ],
)
def test_each_is_named(chat_server: Running, message: Any, param: str, code: str, said: str) -> None:
    error = assert_refused(ask(chat_server, USER, message), 400, said)
    assert (error["param"], error["code"]) == (f"messages.1.{param}", code)


def test_what_changes_nothing_is_taken(chat_server: Running) -> None:
    nothing = {"tool_calls": None, "refusal": None, "audio": None, "annotations": [], "reasoning_content": ""}
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    messages = [USER, {"role": "assistant", "content": "b", **nothing}, {"role": "user", "content": parts}]
    answer = ask(chat_server, *messages)
    assert answer.status_code == 200
    plain = ask(chat_server, USER, {"role": "assistant", "content": "b"}, USER)
    assert answer.json()["usage"]["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"]
    assert ask(chat_server, {"role": "user", "content": ""}).status_code == 200


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (["a"] * 17, "17 stop strings are more than 16"),
        ("", "empty"),
        (["a", ""], "empty"),
        ("a" * 257, "257 characters, more than 256"),
        (["a" * 257], "257 characters"),
    ],
)
def test_stop_strings_are_refused_as_what_they_are(chat_server: Running, stop: Any, said: str) -> None:
    body = {"model": "tiny", "messages": [USER], "max_tokens": 1, "stop": stop}
    error = assert_refused(httpx.post(f"{chat_server.url}/v1/chat/completions", json=body), 400, said)
    assert (error["param"], error["code"]) == ("stop", "invalid_value")
    body["stop"] = ["a" * 256] * 16
    assert httpx.post(f"{chat_server.url}/v1/chat/completions", json=body).status_code == 200
