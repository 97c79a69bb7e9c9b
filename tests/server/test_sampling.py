"""Each key of sampling over HTTP: what it does to an answer, and that the Python engine does the same."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from flextron import Engine, SamplingParams
from flextron.generation.encoding import bad_words_ids
from tests.server.running import Running
from tests.server.test_refusals import assert_refused

BASE = {"model": "tiny", "prompt": "The city", "max_tokens": 12, "temperature": 0, "return_token_ids": True}


def ask(server: Running, **changes: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/completions", json=BASE | changes, timeout=30)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


@pytest.fixture(scope="module")
def greedy(server: Running) -> dict[str, Any]:
    return ask(server)


@pytest.mark.parametrize("one", [{"top_k": 1}, {"min_p": 1}, {"top_p": 0}])
def test_the_likeliest_alone(server: Running, greedy: dict[str, Any], one: dict[str, Any]) -> None:
    assert ask(server, temperature=2, **one)["token_ids"] == greedy["token_ids"]
    assert len({tuple(ask(server, temperature=2, seed=i)["token_ids"]) for i in range(3)}) == 3


@pytest.mark.parametrize(
    "nothing",
    [
        *({"top_k": -1}, {"top_k": 0}, {"min_p": 0}, {"repetition_penalty": 1}, {"logit_bias": {}}),
        *({"presence_penalty": 0}, {"frequency_penalty": 0.0}, {"min_tokens": 0}, {"bad_words": []}),
        *({"stop": []}, {"stop_token_ids": []}),
    ],
)
def test_values_that_change_nothing(server: Running, nothing: dict[str, Any]) -> None:
    assert ask(server, temperature=1, seed=3, **nothing) == ask(server, temperature=1, seed=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"temperature": 1.0, "top_k": 5, "min_p": 0.05, "seed": 4},
        {"repetition_penalty": 1.3, "temperature": 0.8, "seed": 5},
    ],
)
def test_the_engine_draws_the_same(server: Running, changes: dict[str, Any], model: Any) -> None:
    found = ask(server, max_tokens=60, **changes)
    assert found["token_ids"] != ask(server, max_tokens=60)["token_ids"]
    engine = Engine(model, kv_cache_gb=0.005)
    params = SamplingParams(**{"max_tokens": 60, **changes})
    assert list(engine.generate("The city", params)[0].token_ids) == found["token_ids"]


def test_biases_and_allowed_tokens(server: Running, greedy: dict[str, Any]) -> None:
    wanted = next(t for t in range(40, 300) if t not in greedy["token_ids"])
    assert ask(server, logit_bias={str(wanted): 100})["token_ids"] == [wanted] * 12
    first = greedy["token_ids"][0]
    assert first not in ask(server, logit_bias={str(first): -100})["token_ids"]
    assert set(ask(server, allowed_token_ids=[50, 60], temperature=2)["token_ids"]) <= {50, 60}


def test_bad_words(server: Running, greedy: dict[str, Any]) -> None:
    word = greedy["text"].split()[1]
    found = ask(server, bad_words=[word], max_tokens=40)["text"]
    assert word in ask(server, max_tokens=40)["text"]
    assert f" {word} " not in found
    tokenizer = server.service.tokenizer
    assert {tokenizer.decode(ids).strip() for ids in bad_words_ids(tokenizer, [word])} == {word}


def test_stop_tokens_and_what_the_text_keeps(server: Running, greedy: dict[str, Any]) -> None:
    ids = greedy["token_ids"]
    number = next(i for i in range(3, 12) if ids[i] not in ids[:i])
    found = ask(server, stop_token_ids=[ids[number]])
    assert (found["token_ids"], found["finish_reason"]) == (ids[:number], "stop")
    kept = ask(server, stop_token_ids=[ids[number]], include_stop_str_in_output=True)
    text = server.service.tokenizer.decode([ids[number]])
    assert kept["text"] == found["text"] + text
    late = ask(server, stop_token_ids=[ids[number]], min_tokens=number + 2)
    assert len(late["token_ids"]) >= number + 2
    assert late["token_ids"][:number] == ids[:number]


def test_stop_strings_and_what_the_text_keeps(server: Running, greedy: dict[str, Any]) -> None:
    stop = greedy["text"][6:9]
    cut = greedy["text"].index(stop)
    assert ask(server, stop=[stop])["text"] == greedy["text"][:cut]
    assert ask(server, stop=stop, include_stop_str_in_output=True)["text"] == greedy["text"][: cut + 3]
    assert ask(server, stop=stop, min_tokens=12) == greedy | {"finish_reason": "length"}


def test_special_tokens_may_have_a_text(server: Running) -> None:
    tokenizer = server.service.tokenizer
    special = tokenizer.all_special_ids[0]
    forced = {"logit_bias": {str(special): 100}, "ignore_eos": True, "max_tokens": 2}
    assert ask(server, **forced)["text"] == ""
    assert ask(server, **forced, skip_special_tokens=False)["text"] == 2 * tokenizer.convert_ids_to_tokens(special)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "a"}, "frequency_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, None),
        ({"min_tokens": 13}, None),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, None),
    ],
)
def test_bad_values_are_named(server: Running, changes: dict[str, Any], param: str | None) -> None:
    error = assert_refused(httpx.post(f"{server.url}/v1/completions", json=BASE | changes), 400)
    assert param is None or error["param"].startswith(param)
