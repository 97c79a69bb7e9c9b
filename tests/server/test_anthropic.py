"""Anthropic's protocol: what a chat answers, in other words; its own client where it is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from flextron import ElasticModel
from tests.server.running import KEY, Running, running, running_chat
from tests.server.test_refusals import assert_refused
from tests.server.test_structured_clients import TEMPLATE

TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "maxProperties": 0}}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_chat(TEMPLATE) as made:
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
    image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    assert post(server, messages=image).status_code == 400


def test_its_header_holds_the_key(model: ElasticModel) -> None:
    with running(model, api_key=KEY) as made:
        assert httpx.get(f"{made.url}/v1/models", headers={"x-api-key": KEY}).status_code == 200
        assert httpx.get(f"{made.url}/v1/models", headers={"x-api-key": "b"}).status_code == 401


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_its_own_client(server: Running) -> None:
    anthropic: Any = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0) as client:
        asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 40}
        asked["extra_body"] = {"temperature": 0}
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == whole.content[0].text
        called = client.messages.create(**asked, tools=[TOOL], tool_choice={"type": "tool", "name": "f"})
        assert called.content[0].input == {}
        with pytest.raises(anthropic.NotFoundError, match="no model"):
            client.messages.create(**asked | {"model": "other"})
