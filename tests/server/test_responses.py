"""`/v1/responses` by OpenAI's client: what a chat answers, in other words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from openai import OpenAI
from openai.types.responses import ResponseErrorEvent

from tests.server.running import SHORT_TEMPLATE, Running, running_chat
from tests.server.test_refusals import assert_refused
from tests.server.test_tools import SCHEMA

TOOL: Any = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_chat(SHORT_TEMPLATE) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return server.client()


def test_the_answer_is_the_chats(client: OpenAI) -> None:
    found = client.responses.create(model="tiny@0.6", input="a", instructions="b", max_output_tokens=9, temperature=0)
    messages: Any = [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]
    wanted = client.chat.completions.create(model="tiny@0.6", messages=messages, max_tokens=9, temperature=0)
    assert found.output_text == wanted.choices[0].message.content
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    assert found.usage is not None
    assert found.usage.total_tokens == wanted.usage.total_tokens  # type: ignore[union-attr]
    assert found.flextron["target"] == {"latency": 0.6}  # type: ignore[attr-defined]


def test_events_make_up_the_answer(client: OpenAI) -> None:
    options: Any = {"model": "tiny", "input": "a", "max_output_tokens": 20, "temperature": 0}
    events = list(client.responses.create(stream=True, **options))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert [event.sequence_number for event in events] == list(range(len(events)))  # type: ignore[union-attr]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == client.responses.create(**options).output_text  # type: ignore[union-attr]
    assert events[-1].response.usage.output_tokens == 20  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_their_results(client: OpenAI, stream: bool) -> None:
    options: Any = {"model": "tiny", "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    # the template takes few words of the model's positions
    options |= {"input": "a", "max_output_tokens": 60, "tool_choice": {"type": "function", "name": "weather"}}
    options["tools"] = [{**TOOL, "parameters": {"type": "object", "maxProperties": 0}}]
    if stream:
        events = list(client.responses.create(stream=True, **options))
        (item,) = events[-1].response.output  # type: ignore[union-attr]
        text = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
        assert text == item.arguments
    else:
        (item,) = client.responses.create(**options).output
    assert item.type == "function_call"
    jsonschema.validate(json.loads(item.arguments), {"type": "object"})
    result: Any = {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
    history: Any = [{"role": "user", "content": "a"}, item.model_dump(exclude_none=True), result]
    assert client.responses.create(model="tiny", input=history, max_output_tokens=2).output_text


def test_a_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    text: Any = {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    found = client.responses.create(model="tiny", input="a", text=text, max_output_tokens=80)
    assert found.status == "completed"
    jsonschema.validate(json.loads(found.output_text), schema)


def test_what_vllm_adds(client: OpenAI) -> None:
    options: Any = {"model": "tiny", "input": "a", "max_output_tokens": 30, "metadata": {"run": "7"}}
    chat: Any = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 30}
    more = {"seed": 3, "top_k": 4, "stop": ["e"], "repetition_penalty": 1.2}
    found = client.responses.create(**options, extra_body=more)
    wanted = client.chat.completions.create(**chat, extra_body=more)
    assert found.output_text == wanted.choices[0].message.content
    assert (found.status, found.metadata) == ("completed", {"run": "7"})


def test_what_is_cut_is_incomplete(client: OpenAI) -> None:
    options: Any = {"model": "tiny", "input": "a", "max_output_tokens": 3}
    whole = client.responses.create(**options)
    last = list(client.responses.create(stream=True, **options))[-1]
    for answer in (whole, last.response):  # type: ignore[union-attr]
        assert (answer.status, answer.output[0].status) == ("incomplete", "incomplete")  # type: ignore[union-attr]


def test_what_it_counts_is_what_an_answer_reads(client: OpenAI) -> None:
    asked: Any = {"model": "tiny", "input": "a b", "instructions": "c", "tools": [TOOL]}
    usage = client.responses.create(**asked, max_output_tokens=1).usage
    assert usage is not None
    assert client.responses.input_tokens.count(**asked).input_tokens == usage.input_tokens


def test_some_of_the_tools(client: OpenAI) -> None:
    tools = [{"type": "function", "name": n, "parameters": {"type": "object", "maxProperties": 0}} for n in "fgh"]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    asked: Any = {"model": "tiny", "input": "a", "max_output_tokens": 60, "parallel_tool_calls": False}
    (call,) = client.responses.create(**asked, tools=tools, tool_choice=choice).output
    assert (call.type, call.name) == ("function_call", "g")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "harmless", [{"include": ["reasoning.encrypted_content"]}, {"reasoning": {"effort": None, "summary": None}}]
)
def test_what_changes_nothing_is_taken(client: OpenAI, harmless: Any) -> None:
    asked: Any = {"model": "tiny", "input": "a", "max_output_tokens": 8, "temperature": 0}
    answer = client.responses.create(**asked, **harmless).output_text
    assert answer == client.responses.create(**asked).output_text != ""


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "reasoning"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"temperature": 9}, "temperature"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_is_refused_is_named(server: Running, changes: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "input": "a", **changes}
    error = assert_refused(httpx.post(f"{server.url}/v1/responses", json=body), 400)
    assert error["param"] == param


def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    with running_chat(SHORT_TEMPLATE) as made:
        made.slow_down(0.05)
        stream = made.client().responses.create(model="tiny", input="a", max_output_tokens=60, stream=True)
        next(iter(stream))

        def broken() -> None:
            raise RuntimeError("a chip fell out")

        made.service.core.step = broken  # type: ignore[assignment, method-assign]
        last = list(stream)[-1]
    assert isinstance(last, ResponseErrorEvent)
    assert last.type == "error"
    assert "the engine has stopped" in last.message
