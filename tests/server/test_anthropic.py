"""Anthropic's protocol: what a chat answers, in other words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from flextron import ElasticModel
from tests.server.running import KEY, SHORT_TEMPLATE, Running, running, running_chat
from tests.server.test_refusals import assert_refused

TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "maxProperties": 0}}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_chat(SHORT_TEMPLATE) as made:
        yield made


def post(server: Running, path: str = "/v1/messages", **body: Any) -> httpx.Response:
    asked = {"model": "tiny@0.6", "messages": [{"role": "user", "content": "a"}], "max_tokens": 60, **body}
    return httpx.post(server.url + path, json=asked, timeout=60)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    found = []
    for event in answer.text.strip().split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_the_answer_is_the_chats(server: Running) -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    options: Any = {"max_tokens": 9, "temperature": 0}
    found = post(server, system="c", messages=[{"role": "user", "content": content}], **options).json()
    chat = [{"role": "system", "content": "c"}, {"role": "user", "content": "ab"}]
    wanted = post(server, "/v1/chat/completions", messages=chat, **options).json()
    assert found["content"] == [{"type": "text", "text": wanted["choices"][0]["message"]["content"]}]
    assert (found["stop_reason"], found["role"], found["type"]) == ("max_tokens", "assistant", "message")
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == wanted["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == 9


def test_events_make_up_the_answer(server: Running) -> None:
    whole = post(server, max_tokens=12, temperature=0).json()
    found = events(post(server, max_tokens=12, temperature=0, stream=True))
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(e["delta"]["text"] for e in found if e["type"] == "content_block_delta")
    assert [{"type": "text", "text": text}] == whole["content"]
    assert found[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert found[-2]["usage"]["output_tokens"] == 12


def test_calls_and_their_results(server: Running) -> None:
    options: Any = {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    whole = post(server, **options).json()
    (use,) = whole["content"]
    assert (use["type"], use["name"], use["input"], whole["stop_reason"]) == ("tool_use", "f", {}, "tool_use")
    found = events(post(server, **options, stream=True))
    assert found[1]["content_block"]["name"] == "f"
    text = "".join(e["delta"]["partial_json"] for e in found if e["type"] == "content_block_delta")
    assert json.loads(text) == {}
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "sunny"}
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result, {"type": "text", "text": "b"}]},
    ]
    assert post(server, messages=history, tools=[TOOL], max_tokens=2).status_code == 200


def test_refusals_have_its_shape(server: Running) -> None:
    error = post(server, model="other").json()
    assert (error["type"], error["error"]["type"]) == ("error", "not_found_error")
    assert_refused(post(server, thinking={"type": "enabled", "budget_tokens": 1024}), 400, "thinking")
    for kind in ("image", "document", "thinking"):
        block = {"type": kind, "source": {}}
        inside = {"type": "tool_result", "tool_use_id": "t", "content": [block]}
        for content, param in (([block], "messages.0.content.0"), ([inside], "messages.0.content.0.content.0")):
            error = assert_refused(post(server, messages=[{"role": "user", "content": content}]), 400, f"type {kind}")
            assert (error["param"], error["code"]) == (param, "unsupported_content_type")


@pytest.mark.parametrize(
    ("changes", "kind", "param"),
    [
        ({"max_tokens": None}, "invalid_request_error", "max_tokens"),
        ({"messages": [{"role": "user", "content": "a " * 300}]}, "invalid_request_error", "messages"),
        ({"colour": 1}, "invalid_request_error", "colour"),
        ({"model": "tiny@7"}, "invalid_request_error", "model"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_all_refusals_have_its_shape(
    server: Running, path: str, changes: dict[str, Any], kind: str, param: str
) -> None:
    answer = post(server, path, **changes)
    if path.endswith("count_tokens") and param == "messages":
        assert answer.json() == {"input_tokens": len(server.service.tokenizer("a " * 300 + " :")["input_ids"])}
        return
    error = assert_refused(answer, 400)
    assert (error["type"], str(error["param"]).split(".")[0]) in {(kind, param), (kind, "flextron")}


def test_what_it_counts_is_what_an_answer_reads(server: Running) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a b"}]}]
    asked: dict[str, Any] = {"messages": messages, "system": [{"type": "text", "text": "c"}], "tools": [TOOL]}
    counted = httpx.post(f"{server.url}/v1/messages/count_tokens", json={"model": "tiny", **asked}).json()
    usage = post(server, **asked, max_tokens=1, tool_choice={"type": "auto"}).json()["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    found = events(post(server, **asked, max_tokens=1, stream=True))
    assert found[0]["message"]["usage"]["input_tokens"] == counted["input_tokens"]


def test_the_stop_sequence_is_named(server: Running) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 0}
    text = post(server, **options).json()["content"][0]["text"]
    sequence = text.split()[3]
    options["stop_sequences"] = ["#", sequence]
    whole = post(server, **options).json()
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", sequence)
    assert whole["content"][0]["text"] == text[: text.index(sequence)]
    end = events(post(server, **options, stream=True))[-2]["delta"]
    assert end == {"stop_reason": "stop_sequence", "stop_sequence": sequence}


def test_an_answer_goes_on_with_what_the_request_begins(server: Running) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The city"}]
    options: dict[str, Any] = {"messages": messages, "max_tokens": 9, "temperature": 0}
    found = post(server, **options).json()["content"][0]["text"]
    chat = post(server, "/v1/chat/completions", **options, continue_final_message=True).json()
    assert found == chat["choices"][0]["message"]["content"]


def test_failures_of_tools_are_told(server: Running) -> None:
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    counts = []
    for result in ({"content": "sunny"}, {"content": "sunny", "is_error": True}, {"content": "Error: sunny"}):
        history = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", **result}]},
        ]
        counts.append(post(server, "/v1/messages/count_tokens", messages=history).json()["input_tokens"])
    assert counts[0] < counts[1] == counts[2]


def test_a_schema(server: Running) -> None:
    properties = {"a": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    answer = post(server, output_config={"format": {"type": "json_schema", "schema": schema}}).json()
    assert isinstance(json.loads(answer["content"][0]["text"])["a"], bool)
    assert_refused(post(server, output_config={"effort": "low"}), 400)


def test_its_header_holds_the_key(model: ElasticModel) -> None:
    with running(model, api_key=KEY) as made:
        error = httpx.post(f"{made.url}/v1/messages", json={}).json()
        assert (error["type"], error["error"]["type"]) == ("error", "authentication_error")
        assert httpx.get(f"{made.url}/v1/models", headers={"x-api-key": KEY}).status_code == 200
        assert httpx.get(f"{made.url}/v1/models", headers={"x-api-key": "b"}).status_code == 401
