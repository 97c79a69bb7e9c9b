"""Clients that the development environment has: OpenAI's own, litellm, curl."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import jsonschema
import openai
import pytest

from tests.server.clients.record import client
from tests.server.clients.schemas import MESSAGES, TOKENS, City, city_tool
from tests.server.running import KEY, Running, events

pytestmark = pytest.mark.filterwarnings("ignore")


@client("openai (Python)", "chat, whole and streamed")
def test_openai_chats(tool_server: Running) -> None:
    completions = tool_server.client().chat.completions
    options: Any = {"model": "tiny@0.6", "messages": MESSAGES, "max_completion_tokens": 9, "temperature": 0}
    whole = completions.create(**options)
    chunks = list(completions.create(stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


@client("openai (Python)", "structured output")
@client("openai (Python)", "tools")
def test_openai_parses_answers_and_calls(tool_server: Running) -> None:
    completions = tool_server.client().chat.completions
    for seed in range(3):
        options: Any = {"model": "tiny@0.6", "messages": MESSAGES, "max_tokens": TOKENS, "seed": seed}
        parsed = completions.parse(response_format=City, **options).choices[0].message.parsed
        assert isinstance(parsed, City)
        called = completions.create(tools=[city_tool()], tool_choice="required", parallel_tool_calls=False, **options)
        (call,) = called.choices[0].message.tool_calls or []
        City.model_validate_json(call.function.arguments)  # type: ignore[union-attr]
        with completions.stream(response_format=City, **options) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == parsed


@client("openai (Python)", "responses, whole and streamed")
def test_openai_responses(tool_server: Running) -> None:
    responses = tool_server.client().responses
    parsed = responses.parse(model="tiny", input="a", text_format=City, max_output_tokens=TOKENS)
    assert isinstance(parsed.output_parsed, City)
    # the client wants streams to end by themselves
    with responses.stream(model="tiny", input="a", text_format=City, max_output_tokens=TOKENS) as stream:
        kinds = [event.type for event in stream]
        assert isinstance(stream.get_final_response().output_parsed, City)
    assert kinds.count("response.output_text.delta") > 3


@client("openai (Python)", "completions and embeddings")
def test_openai_completes_and_embeds(tool_server: Running) -> None:
    own = tool_server.client()
    plain = own.completions.create(model="tiny", prompt=["In", "a"], n=2, best_of=2, echo=True, max_tokens=3)
    assert [choice.text[:1] for choice in plain.choices] == ["I", "I", "a", "a"]
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        own.completions.create(model="tiny", prompt="In", suffix="end")
    assert len(own.embeddings.create(model="tiny", input=["a", "b"]).data) == 2


@client("litellm", "chat, whole and streamed")
@client("litellm", "completions")
def test_litellm(chat_server: Running, litellm: Any) -> None:
    options: dict[str, Any] = {"api_base": f"{chat_server.url}/v1", "api_key": KEY, "temperature": 0, "max_tokens": 8}
    messages = [{"role": "user", "content": "The city was"}]
    wanted = chat_server.client().chat.completions.create(
        model="tiny@0.6",
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=8,
    )
    whole = litellm.completion(model="openai/tiny@0.6", messages=messages, **options)
    assert whole.choices[0].message.content == wanted.choices[0].message.content
    assert whole.usage.completion_tokens == 8
    stream = litellm.completion(model="openai/tiny@0.6", messages=messages, stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == wanted.choices[0].message.content
    plain = litellm.text_completion(model="text-completion-openai/tiny@0.6", prompt="In 1998", **options)
    assert plain.choices[0].text
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/other", messages=messages, **options)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(model="openai/tiny", messages=[{"role": "user", "content": "a " * 300}], **options)


@client("litellm", "structured output")
@client("litellm", "tools, whole and streamed")
def test_litellm_calls_tools(tool_server: Running, litellm: Any) -> None:
    options: Any = {"model": "openai/tiny", "api_base": f"{tool_server.url}/v1", "api_key": KEY, "max_tokens": TOKENS}
    answer = litellm.completion(messages=MESSAGES, response_format=City, seed=1, **options)
    City.model_validate_json(answer.choices[0].message.content)
    choice = {"type": "function", "function": {"name": "City"}}
    asked: Any = {"messages": MESSAGES, "tools": [city_tool()], "tool_choice": choice, "seed": 2, **options}
    (call,) = litellm.completion(**asked).choices[0].message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), City.model_json_schema())
    built = litellm.stream_chunk_builder(list(litellm.completion(stream=True, **asked)))
    assert built.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


@client("curl", "streamed completions")
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(server: Running) -> None:
    body = json.dumps({"model": "tiny@0.8", "prompt": "In", "max_tokens": 3, "stream": True, "user": "me"})
    command = ["curl", "-sNi", f"{server.url}/v1/completions", "--json", body, "-H", "x-request-id: mine"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    head, _, text = out.partition("\n\n")
    assert " 200 " in head
    assert "text/event-stream" in head
    assert "x-request-id: mine" in head
    assert events(text)[-1] == "[DONE]"
