"""Tools over HTTP: choices, streams, history, templates that know of tools and such that do not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from transformers import MistralConfig
from transformers.utils.chat_template_utils import render_jinja_template

import flextron
from tests.checkpoints.families_cases import HEADS, SIZES, random_from
from tests.server.running import Running, running, running_chat
from tests.server.test_refusals import assert_refused
from tests.tokenizers_zoo import zoo_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 3}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "time", "parameters": {**SCHEMA, "required": []}, "strict": True}}
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


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def prompt_of(server: Running, **body: Any) -> str:
    answer = post(server, **{"return_token_ids": True, "max_tokens": 1, **body})
    assert answer.status_code == 200, answer.text
    return str(server.service.tokenizer.decode(answer.json()["prompt_token_ids"]))


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "time"}),
        ({"type": "function", "function": {"name": "time"}}, {"time"}),
        (allowed("required", "time"), {"time"}),
        (allowed("required", "time", "weather"), {"weather", "time"}),
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
    some, all_of_them = (
        post(knowing, tools=[WEATHER], tool_choice=choice, seed=1).json()["choices"][0]
        for choice in (allowed("auto", "weather"), "auto")
    )
    assert some == all_of_them


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
        ({"tools": [WEATHER], "tool_choice": allowed("auto", "x")}, "tool_choice", "'x'"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice", "'any' is none of"),
        ({"tools": [WEATHER], "tool_choice": {"type": "custom"}}, "tool_choice", "'custom' is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [{"type": "browser"}]}, "tools.0.type", "'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "x"}}}]}, "tools", "type"),
        ({"tools": [WEATHER], "guided_regex": "a"}, "guided_regex", "goes with tools only"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "exclude each other",
        ),
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


MISTRAL = (
    "{{ bos_token }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools is defined and tools is not none and m == users[-1] %}"
    "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls is defined and m.tool_calls is not none %}FIRST"
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "EACH{% endfor %}LAST{{ eos_token }}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    '[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LISTED = (
    MISTRAL.replace("FIRST", "[TOOL_CALLS] [")
    .replace("LAST", "]")
    .replace("EACH", '{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}')
)
"""As Mistral 7B 0.3 writes calls."""
MARKED = (
    MISTRAL.replace("FIRST", "")
    .replace("LAST", "")
    .replace("EACH", "[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]{{ c.function.arguments | tojson }}")
)
"""As Mistral Small 3.2 does."""
MARKS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[ARGS]")


@pytest.fixture(scope="module", params=[LISTED, MARKED], ids=["listed", "marked"])
def mistral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of a model whose tokenizer has Mistral's markers as special tokens."""
    tokenizer = zoo_tokenizer("mistral")
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKS, "[CALL_ID]"]})
    tokenizer.chat_template = request.param
    directory = tmp_path_factory.mktemp("mistral")
    random_from(
        MistralConfig(**SIZES | HEADS | {"vocab_size": len(tokenizer), "max_position_embeddings": 4096})
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    with running(flextron.convert(directory, num_calibration_tokens=128, context=32)) as made:
        yield made


def test_mistrals_calls_go_there_and_back(mistral: Running) -> None:
    tools = [WEATHER, TIME]
    tokenizer = mistral.service.tokenizer
    body = {"model": "tiny", "tools": tools, "tool_choice": "required", "max_tokens": 400, "return_token_ids": True}
    # a random model would call without end
    ends = {str(tokenizer.convert_tokens_to_ids(token)): 8 for token in ("</s>", "]", '"', "0")}
    answer = post(mistral, **body, logit_bias=ends, seed=3).json()
    (choice,) = answer["choices"]
    calls = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    for call in calls:
        assert re.fullmatch("[a-zA-Z0-9]{9}", call["id"])
        assert call["function"]["name"] in ("weather", "time")
        jsonschema.validate(json.loads(call["function"]["arguments"]), {**SCHEMA, "required": []})
    first = tokenizer.apply_chat_template([USER], tools=tools, tokenize=True, return_dict=False)
    assert answer["prompt_token_ids"] == first
    assert tokenizer.decode(choice["token_ids"]).startswith("[TOOL_CALLS]")

    # the client sends them back, under its own ids or under ours
    for ids in ([call["id"] for call in calls], [f"call_{i:020}" for i in range(len(calls))]):
        told = [{**call, "id": own} for call, own in zip(calls, ids, strict=True)]
        results = [{"role": "tool", "tool_call_id": own, "content": "sunny"} for own in ids]
        history = [USER, {"role": "assistant", "content": None, "tool_calls": told}, *results]
        prompt = post(mistral, **body | {"tool_choice": "auto", "max_tokens": 1}, messages=history).json()
        written = tokenizer.decode(prompt["prompt_token_ids"])
        found = re.findall(r'\[CALL_ID\](\w{9})\[ARGS\]|"id": "(\w{9})"', written)
        short = [a or b for a, b in found]
        assert len(set(short)) == len(calls)
        assert re.findall(r'"call_id": "(\w{9})"', written) == short
        if ids[0] == calls[0]["id"]:
            parsed = [
                {
                    "id": c["id"],
                    "type": "function",
                    "function": c["function"] | {"arguments": json.loads(c["function"]["arguments"])},
                }
                for c in calls
            ]
            wanted: Any = [USER, {"role": "assistant", "content": "", "tool_calls": parsed}, *results]
            assert prompt["prompt_token_ids"] == tokenizer.apply_chat_template(wanted, tools=tools, return_dict=False)


def test_mistrals_calls_in_a_stream(mistral: Running) -> None:
    body: Any = {"model": "tiny", "messages": [USER], "tools": [WEATHER, TIME], "tool_choice": "required"}
    body |= {"max_tokens": 100, "seed": 3, "temperature": 1}
    whole = post(mistral, **body).json()["choices"][0]["message"]["tool_calls"]
    calls: list[list[str]] = []
    for chunk in mistral.client().chat.completions.create(stream=True, **body):
        for part in chunk.choices[0].delta.tool_calls or []:
            assert part.function is not None
            if part.id:
                calls.append([part.function.name or "", ""])
            calls[part.index][1] += part.function.arguments or ""
        assert not chunk.choices[0].delta.content
    assert calls == [[c["function"]["name"], c["function"]["arguments"]] for c in whole]


def test_tools_take_the_template_that_is_made_for_them() -> None:
    named = {"default": "{% for m in messages %}{{ m.content }}{% endfor %}:", "tool_use": KNOWING}
    with running_chat(named) as server:  # type: ignore[arg-type]
        tokenizer = server.service.tokenizer
        for tools in ([WEATHER], None):
            wanted = tokenizer.apply_chat_template([USER], tools=tools, tokenize=False, add_generation_prompt=True)
            assert prompt_of(server, **({"tools": tools} if tools else {})) == wanted


DEEPSEEK = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name + '|' + c.function.arguments }}</call>{% endfor %}"
    "{% else %}{{ m.role + ':' + m.content }}{% endif %}{% endfor %}"
)
"""As the distilled models of DeepSeek-R1 have it: calls only where there is no content, arguments as texts."""
OBJECTS = DEEPSEEK.replace("c.function.arguments", "c.function.arguments | tojson")


@pytest.mark.parametrize("template", [DEEPSEEK, OBJECTS])
def test_calls_reach_templates_that_take_them_in_other_forms(template: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    history: list[dict[str, Any]] = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    history.append({"role": "tool", "tool_call_id": "c1", "content": "sunny"})
    with running_chat(template) as server:
        theirs = [{**message} for message in history]
        if template is OBJECTS:
            parsed = {**call, "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
            theirs[1] = {**theirs[1], "tool_calls": [parsed]}
        # as transformers rendered it before version 5 took the content away
        (wanted,), _ = render_jinja_template(conversations=[theirs], chat_template=template)
        assert "weather" in wanted
        for content in (None, ""):
            history[1] = {**history[1], "content": content}
            assert prompt_of(server, messages=history) == wanted


def test_calls_that_a_template_leaves_out_are_refused() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    history = [USER, {"role": "assistant", "content": "b", "tool_calls": [call]}, USER]
    with running_chat("{% if tools %}!{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}") as server:
        error = assert_refused(post(server, messages=history, tools=[WEATHER]), 400, "leaves out tool_calls")
        assert error["param"] == "messages"
