"""Answers that follow a grammar, at temperature 1, beside free requests; checked by jsonschema and by `re`."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest

from flextron import ElasticModel, Engine
from flextron.engine import EngineSettings
from tests.server.running import Running, running
from tests.server.test_refusals import assert_refused

TEXT = {"type": "string", "maxLength": 6}
NUMBER = {"type": "integer", "minimum": -20, "maximum": 99}


def an_object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: list[Any] = [
    an_object(a=NUMBER),
    an_object(name=TEXT, age=NUMBER),
    an_object(kind={"enum": ["red", "green", 3, None]}),
    an_object(on={"type": "boolean"}, off={"type": "null"}),
    an_object(inner=an_object(deep=an_object(a=NUMBER))),
    an_object(items={"type": "array", "items": NUMBER, "minItems": 1, "maxItems": 3}),
    an_object(pair={"type": "array", "prefixItems": [TEXT, NUMBER], "items": False, "minItems": 2}),
    an_object(word={"type": "string", "pattern": "^[a-z]{2,4}$"}),
    an_object(day={"type": "string", "format": "date"}),
    an_object(one={"anyOf": [NUMBER, TEXT, {"type": "boolean"}]}),
    an_object(fixed={"const": "v1"}, n={"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 5}),
    {"type": "array", "items": an_object(a={"type": "boolean"}), "minItems": 1, "maxItems": 2},
    {"enum": ["yes", "no"]},
    {"type": "integer", "minimum": 7, "maximum": 12},
    {"$defs": {"leaf": an_object(v=NUMBER)}, **an_object(a={"$ref": "#/$defs/leaf"}, b={"$ref": "#/$defs/leaf"})},
    an_object(**{'é "quoted"': {"type": "boolean"}}),
    {"type": "object", "properties": {"a": NUMBER}, "required": [], "additionalProperties": False},
    an_object(t={"type": "string", "minLength": 2, "maxLength": 3}),
    {"oneOf": [an_object(cat={"const": 1}), an_object(dog={"const": 2})]},
    an_object(a=an_object(b={"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2}), c=TEXT),
]


def post(server: Running, **body: Any) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    asked = {"model": "tiny", "max_tokens": 110, "temperature": 1, **body}
    return httpx.post(server.url + path, json=asked, timeout=120)


def whole(answer: httpx.Response) -> str:
    """The text of an answer that has come to its end."""
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


def ends_well(server: Running, number: int) -> bool:
    """Every third request has a free one beside it; targets, names of the key and endpoints take turns.

    False if the answer needed more tokens than the model has positions; else it must be valid.
    """
    schema, model = SCHEMAS[number % len(SCHEMAS)], ["tiny", "tiny@0.6", "tiny@0.5"][number % 3]
    if number % 3 == 2:
        assert post(server, model=model, prompt="In", max_tokens=20, seed=number).status_code == 200
    keys = [
        {"prompt": "In", "guided_json": schema},
        {"prompt": "In", "structured_outputs": {"json": json.dumps(schema)}},
        {
            "messages": [{"role": "user", "content": "Say it."}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}},
        },
    ]
    answer = post(server, model=model, seed=number, **keys[number // 20 % 3])
    if answer.json()["choices"][0]["finish_reason"] == "length":
        return False
    jsonschema.validate(json.loads(whole(answer)), schema)
    return True


def test_answers_are_valid_beside_free_ones(chat_server: Running) -> None:
    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(lambda number: ends_well(chat_server, number), range(60))) >= 58
    chat_server.wait_until_idle()


@pytest.mark.slow
def test_two_hundred_answers_are_valid_beside_free_ones(chat_server: Running) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda number: ends_well(chat_server, 60 + number), range(200))) >= 194


def test_drafts_follow_the_grammar(model: ElasticModel) -> None:
    """Greedy answers are those without drafts; drawn ones are valid, and drafts are accepted."""
    greedy = {"prompt": "In", "guided_json": SCHEMAS[5], "temperature": 0, "return_token_ids": True, "n": 1}
    with running(model) as plain:
        wanted = [post(plain, **greedy, model=name).json()["choices"] for name in ("tiny", "tiny@0.6")]
    engine = Engine(model, kv_cache_gb=0.005, speculate="float32")
    speculation = engine.core.settings.speculation
    with running(model, {"speculation": speculation}) as drafted:
        assert isinstance(drafted.service.core.settings, EngineSettings)
        found = [post(drafted, **greedy, model=name).json()["choices"] for name in ("tiny", "tiny@0.6")]
        for number in range(0, 20, 2):
            schema = SCHEMAS[number]
            text = whole(post(drafted, prompt="In", guided_json=schema, seed=number, logit_bias={"5": 1}))
            jsonschema.validate(json.loads(text), schema)
        speculator = drafted.service.core.speculator
        assert speculator is not None
        assert speculator.num_accepted > 20
    assert found == wanted


def test_expressions_choices_and_grammars(server: Running) -> None:
    for seed in range(5):
        assert re.fullmatch(r"[ab]{3}-\d", whole(post(server, prompt="In", guided_regex=r"[ab]{3}-\d", seed=seed)))
        choice = ["yes", 'é"\n', "no"]
        assert whole(post(server, prompt="In", guided_choice=choice, seed=seed)) in choice
        gbnf = 'root ::= ("x" | "yy") " " [0-9]'
        assert re.fullmatch(r"(x|yy) \d", whole(post(server, prompt="In", grammar=gbnf, seed=seed)))
        lark = 'start: "a" B\nB: /[0-9]+/'
        found = post(server, prompt="In", structured_outputs={"grammar": lark}, max_tokens=8, seed=seed).json()
        assert re.fullmatch(r"a\d+", found["choices"][0]["text"])


def test_any_object(chat_server: Running) -> None:
    asked = {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}}
    texts = [post(chat_server, **asked, seed=seed).json()["choices"][0] for seed in range(6)]
    ended = [choice["message"]["content"] for choice in texts if choice["finish_reason"] == "stop"]
    assert all(isinstance(json.loads(text), dict) for text in ended)
    assert all(choice["message"]["content"].lstrip().startswith("{") for choice in texts)


def test_streams_and_several_answers(server: Running) -> None:
    stream = server.client().completions.create(
        model="tiny", prompt="In", max_tokens=110, stream=True, n=3, extra_body={"guided_json": SCHEMAS[1]}
    )
    texts = ["", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS[1])


@pytest.mark.parametrize(
    ("keys", "param", "said"),
    [
        ({"guided_json": {"type": "nothing"}}, "guided_json", "Invalid type"),
        ({"guided_json": "{"}, "guided_json", "cannot be read"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_grammar": "?"}, "guided_grammar", "grammar"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "give one of them"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex", "give one of them"),
        ({"structured_outputs": {"tag": "a"}}, "structured_outputs.tag", ""),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "give a schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type", "use json_schema"),
        ({"guided_json": {"properties": {"a": {"$ref": "http://127.0.0.1/x"}}}}, "guided_json", "not fetch"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "leave one of them out"),
    ],
)
def test_what_cannot_be_followed_is_named(server: Running, keys: dict[str, Any], param: str, said: str) -> None:
    assert assert_refused(post(server, prompt="In", **keys), 400, said)["param"] == param
    server.wait_until_idle()
