"""Tools over HTTP: choices, streams, history, templates that know of tools and such that do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests.server.running import Running, running_chat
from tests.server.test_refusals import assert_refused

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 3}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "time", "strict": True, "parameters": {**SCHEMA, "required": []}}}
USER = {"role": "user", "content": "a"}
KNOWING = (
    "{% if tools %}tools:{% for t in tools %}{{ t.function.name }}{% endfor %}{{ '\\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments.city }}</tool_call>"
    "{% endfor %}{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{{ mood }}"
)


@pytest.fixture(scope="module")
def knowing() -> Iterator[Running]:
    """Of a model whose template is made for tools."""
    with running_chat(KNOWING) as made:
        yield made


def post(server: Running, **body: Any) -> httpx.Response:
    asked = {"model": "tiny@0.6", "messages": [USER], "max_tokens": 96, "temperature": 1, **body}
    return httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60)


def prompt_of(server: Running, **body: Any) -> str:
    answer = post(server, **{"return_token_ids": True, "max_tokens": 1, **body})
    assert answer.status_code == 200, answer.text
    return str(server.service.tokenizer.decode(answer.json()["prompt_token_ids"]))


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "time"}),
        ({"type": "function", "function": {"name": "time"}}, {"time"}),
    ],
)
def test_calls_that_must_come(knowing: Running, choice: Any, names: set[str]) -> None:
    found = set()
    for seed in range(8):
        body = {"tools": [WEATHER, TIME], "tool_choice": choice, "seed": seed, "parallel_tool_calls": False}
        answer = post(knowing, **body).json()["choices"][0]
        message = answer["message"]
        assert (answer["finish_reason"], message["content"], message["role"]) == ("tool_calls", None, "assistant")
        (call,) = message["tool_calls"]
        assert call["type"] == "function"
        assert call["id"].startswith("call_")
        found.add(call["function"]["name"])
        wanted = SCHEMA if call["function"]["name"] == "weather" else TIME["function"]["parameters"]  # type: ignore[index]
        jsonschema.validate(json.loads(call["function"]["arguments"]), wanted)
    assert found <= names


def test_streamed_calls_are_those_of_the_whole_answer(knowing: Running) -> None:
    options: Any = {
        "model": "tiny",
        "messages": [USER],
        "tools": [WEATHER, TIME],
        "tool_choice": "required",
        "seed": 5,
        "max_tokens": 96,
        "n": 2,
    }
    client = knowing.client()
    whole = client.chat.completions.create(**options)
    calls: list[dict[int, dict[str, str]]] = [{}, {}]
    reasons: dict[int, str] = {}
    for chunk in client.chat.completions.create(stream=True, **options):
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or []:
                call = calls[choice.index].setdefault(part.index, {"name": "", "arguments": ""})
                assert part.function is not None
                assert (part.id is not None) == (part.function.name is not None)
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert choice.message.tool_calls
        wanted = [{"name": c.function.name, "arguments": c.function.arguments} for c in choice.message.tool_calls]
        assert list(calls[choice.index].values()) == wanted
        assert reasons[choice.index] == choice.finish_reason


def test_auto_leaves_the_choice_and_none_takes_it(knowing: Running) -> None:
    free = post(knowing, tools=[WEATHER], seed=1).json()["choices"][0]
    assert free["finish_reason"] in ("stop", "length")
    assert free["message"]["content"]
    assert "tool_calls" not in free["message"]
    # the model is led to the trigger, and then the grammar takes over
    trigger = knowing.service.tokenizer.encode("<tool_call>", add_special_tokens=False)
    led = post(knowing, tools=[WEATHER], logit_bias={str(t): 30 for t in trigger}, min_p=0.001, seed=1).json()
    for call in led["choices"][0]["message"].get("tool_calls", []):
        assert call["function"]["name"] == "weather"
    none, without = (
        post(knowing, **keys, seed=4, max_tokens=9).json()["choices"][0]
        for keys in ({"tools": [WEATHER], "tool_choice": "none"}, {})
    )
    assert none == without


def test_the_template_gets_tools_calls_and_results(knowing: Running) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    assert prompt_of(knowing, messages=history, tools=[WEATHER, TIME]) == (
        "tools:weathertime\nuser: a\nassistant: <tool_call>weather Bonn</tool_call>\ntool: sunny(c1)\nassistant:"
    )
    assert prompt_of(knowing, tools=[WEATHER], tool_choice="none") == "user: a\nassistant:"


def test_a_template_without_tools_gets_texts(chat_server: Running) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "B"}'}}
    history = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    text = prompt_of(chat_server, messages=history)
    assert text == (
        'assistant: <tool_call>\n{"name": "weather", "arguments": {"city": "B"}}\n</tool_call>\n'
        "user: <tool_response>\nsunny\n</tool_response>\nassistant:"
    )


def test_more_for_the_template(knowing: Running) -> None:
    assert prompt_of(knowing, chat_template_kwargs={"mood": "!"}) == "user: a\nassistant:!"
    assert prompt_of(knowing, add_generation_prompt=False) == "user: a\n"
    messages = [USER, {"role": "assistant", "content": "The city"}]
    assert prompt_of(knowing, messages=messages, continue_final_message=True).endswith("assistant: The city")


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [{"type": "browser"}]}, "tools.0.type", "'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "x"}}}]}, "tools", "type"),
        ({"tools": [WEATHER], "guided_regex": "a"}, "guided_regex", "goes with tools only"),
        ({"continue_final_message": True, "add_generation_prompt": True}, None, "exclude each other"),
    ],
)
def test_what_does_not_fit_is_named(knowing: Running, body: dict[str, Any], param: str | None, said: str) -> None:
    assert assert_refused(post(knowing, **body), 400, said)["param"] == param


def test_a_schema_for_answers_beside_tools(knowing: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answer = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for seed in range(6):
        message = post(knowing, tools=[WEATHER], response_format=answer, seed=seed).json()["choices"][0]["message"]
        if "tool_calls" not in message:
            jsonschema.validate(json.loads(message["content"]), schema)
