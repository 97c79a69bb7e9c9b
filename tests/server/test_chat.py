"""`/v1/chat/completions` through OpenAI's own client, against completions of the rendered conversation."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.server.running import Running

MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "The city was"}]
RENDERED = "system: Be short.\nuser: The city was\nassistant:"


@pytest.fixture(scope="module")
def client(chat_server: Running) -> OpenAI:
    return chat_server.client()


def ask(client: OpenAI, messages: Any = MESSAGES, **options: Any) -> Any:
    values = {"model": "tiny@0.6", "temperature": 0, "max_completion_tokens": 24, **options}
    return client.chat.completions.create(messages=messages, **values)


def test_the_answer_is_the_completion_of_the_template(client: OpenAI) -> None:
    wanted = client.completions.create(model="tiny@0.6", prompt=RENDERED, max_tokens=24, temperature=0)
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == wanted.choices[0].text
    assert answer.usage.total_tokens == wanted.usage.total_tokens
    assert answer.flextron == wanted.flextron  # type: ignore[attr-defined]
    parts = [{"type": "text", "text": "The city"}, {"type": "text", "text": " was"}]
    same = ask(client, [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}])
    assert same.choices == answer.choices


def test_what_ended_an_answer_is_named(client: OpenAI, chat_server: Running) -> None:
    text = ask(client).choices[0].message.content
    word = text.split()[2]
    ids = chat_server.service.tokenizer.encode(text, add_special_tokens=False)
    for changes, wanted in (
        ({}, None),
        ({"stop": ["#", word]}, word),
        ({"extra_body": {"stop_token_ids": [ids[3]]}}, ids[3]),
        ({"extra_body": {"stop_token_ids": list(chat_server.service.defaults.ends)}}, None),
    ):
        assert ask(client, **changes).choices[0].stop_reason == wanted
        *_, last = ask(client, stream=True, **changes)
        assert last.choices[0].stop_reason == wanted
        plain = client.completions.create(model="tiny@0.6", prompt=RENDERED, max_tokens=24, temperature=0, **changes)
        assert plain.choices[0].stop_reason == wanted  # type: ignore[attr-defined]


def test_usage_of_every_chunk(client: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, stream=True, stream_options=options, logprobs=True))
    so_far = 0
    for chunk in chunks:
        for choice in chunk.choices:
            so_far += len(choice.logprobs.content) if choice.logprobs else 0
        assert chunk.usage.completion_tokens == so_far
    assert chunks[0].usage.prompt_tokens == chunks[-1].usage.prompt_tokens > 0
    assert so_far == 24


def test_spelled_out_defaults_change_nothing(client: OpenAI) -> None:
    plain = ask(client, logprobs=False, top_logprobs=0, parallel_tool_calls=True, tools=[], tool_choice="auto")
    assert plain.choices == ask(client).choices


def test_too_long_has_openais_code(client: OpenAI) -> None:
    for options in ({"max_completion_tokens": 127}, {"messages": [{"role": "user", "content": "a " * 400}]}):
        with pytest.raises(openai.BadRequestError, match="longer than the model's context length") as refused:
            ask(client, **options)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_makes_up_the_whole(client: OpenAI, seed: int) -> None:
    options: dict[str, Any] = {"seed": seed, "temperature": 1.3, "n": 2, "stop": " a"}
    options |= {"logprobs": True, "top_logprobs": 2}
    whole = ask(client, **options)
    texts, tokens, reasons, roles = ["", ""], [[], []], [None, None], [None, None]
    *chunks, last = list(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] = choice.delta.role or roles[choice.index]
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason
    assert texts == [c.message.content for c in whole.choices]
    assert tokens == [c.logprobs.content for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]
    assert roles == ["assistant"] * 2
    # what is cached grows with each request
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(last.usage, name) == getattr(whole.usage, name)
    assert all(len(t.top_logprobs) == 2 for entries in tokens for t in entries)


def test_an_answer_may_fill_the_rest_of_the_context(client: OpenAI) -> None:
    usage = ask(client, max_completion_tokens=None, seed=1, temperature=1).usage
    assert usage.total_tokens <= 128
    assert usage.completion_tokens > 24


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "function", "content": "a"}]}, "no tools here"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0"),
        ({"max_tokens": 3}, "differ"),
        ({"top_logprobs": 3}, "logprobs to true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
        ({"functions": [{"name": "f"}]}, "functions is not supported"),
        ({"max_completion_tokens": 128}, "shorten the prompt"),
    ],
)
def test_what_cannot_be_answered(client: OpenAI, options: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        ask(client, **{"messages": MESSAGES, **options})


def test_a_conversation_that_is_too_long_is_blamed(client: OpenAI) -> None:
    for text in ("a " * 300, "a" * 10**6):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, [{"role": "user", "content": text}])
        assert refused.value.param == "messages"


def test_a_model_without_a_template_says_so(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match=r"no chat template; use /v1/completions"):
        ask(server.client())
