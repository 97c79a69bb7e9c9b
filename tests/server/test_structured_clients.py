"""Clients that want structured answers and tools; those that are no dependencies run where they are installed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Any

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.server.running import KEY, Running, running_chat

pytestmark = pytest.mark.filterwarnings("ignore")
MESSAGES: Any = [{"role": "user", "content": "a"}]
TOKENS = 90
TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% for c in m.tool_calls or [] %}{{ c.function.name }} {% endfor %}"
    "{% endfor %}{% if tools %}{% endif %}:"
)
"""It is made for tools, and short: the model has few positions."""


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=4)]
    size: Annotated[int, Field(ge=0, le=9)]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_chat(TEMPLATE) as made:
        yield made


def tool() -> dict[str, Any]:
    return {"type": "function", "function": {"name": "City", "parameters": City.model_json_schema()}}


def test_openai_parses_answers_and_calls(server: Running) -> None:
    completions = server.client().chat.completions
    for seed in range(3):
        options: Any = {"model": "tiny@0.6", "messages": MESSAGES, "max_tokens": TOKENS, "seed": seed}
        parsed = completions.parse(response_format=City, **options).choices[0].message.parsed
        assert isinstance(parsed, City)
        called = completions.create(tools=[tool()], tool_choice="required", parallel_tool_calls=False, **options)
        (call,) = called.choices[0].message.tool_calls or []
        City.model_validate_json(call.function.arguments)  # type: ignore[union-attr]
        with completions.stream(response_format=City, **options) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_litellm(server: Running, litellm: Any) -> None:
    options: Any = {"model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": KEY, "max_tokens": TOKENS}
    answer = litellm.completion(messages=MESSAGES, response_format=City, seed=1, **options)
    City.model_validate_json(answer.choices[0].message.content)
    choice = {"type": "function", "function": {"name": "City"}}
    called = litellm.completion(messages=MESSAGES, tools=[tool()], tool_choice=choice, seed=2, **options)
    (call,) = called.choices[0].message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), City.model_json_schema())
    stream = litellm.completion(messages=MESSAGES, tools=[tool()], tool_choice=choice, seed=2, stream=True, **options)
    built = litellm.stream_chunk_builder(list(stream))
    assert built.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(server: Running, mode: str) -> None:
    instructor: Any = pytest.importorskip("instructor")
    client = instructor.from_openai(server.client(), mode=getattr(instructor.Mode, mode))
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_model=City, max_tokens=TOKENS, max_retries=0
    )
    assert isinstance(found, City)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain(server: Running, method: str) -> None:
    langchain: Any = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key=KEY, max_tokens=TOKENS)
    assert isinstance(model.with_structured_output(City, method=method).invoke("a"), City)
    called = model.bind_tools([City], tool_choice="required", parallel_tool_calls=False).invoke("a")
    City.model_validate(called.tool_calls[0]["args"])


@pytest.mark.slow
@pytest.mark.parametrize("output", ["ToolOutput", "NativeOutput"])
def test_pydantic_ai(server: Running, output: str) -> None:
    ai: Any = pytest.importorskip("pydantic_ai")
    chat: Any = pytest.importorskip("pydantic_ai.models.openai")
    provider: Any = pytest.importorskip("pydantic_ai.providers.openai")
    model = chat.OpenAIChatModel("tiny", provider=provider.OpenAIProvider(base_url=f"{server.url}/v1", api_key=KEY))
    agent = ai.Agent(model, output_type=getattr(ai, output)(City), model_settings={"max_tokens": TOKENS})
    assert isinstance(asyncio.run(agent.run("a")).output, City)
