"""Clients in Python that are no dependencies: `make test-clients` installs and runs them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.clients.record import client
from tests.server.clients.schemas import MESSAGES, TOKENS, City, Go
from tests.server.running import KEY, Running

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "maxProperties": 0}}


def chat(server: Running, **options: Any) -> Any:
    langchain = pytest.importorskip("langchain_openai")
    options = {"max_tokens": TOKENS, "max_retries": 0, **options}
    return langchain.ChatOpenAI(model="tiny@0.6", base_url=f"{server.url}/v1", api_key=KEY, **options)


@client("LangChain", "chat, whole and streamed")
@client("LangChain", "completions and embeddings")
def test_langchain(tool_server: Running) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = chat(tool_server, temperature=0, max_tokens=9)
    chunks = list(model.stream("a", stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == model.invoke("a").content
    assert next(c.usage_metadata for c in chunks if c.usage_metadata)["output_tokens"] == 9
    options: Any = {"model": "tiny@0.6", "base_url": f"{tool_server.url}/v1", "api_key": KEY}
    assert langchain.OpenAI(max_tokens=4, **options).invoke("In")
    own = langchain.OpenAIEmbeddings(check_embedding_ctx_length=False, **options)
    assert len(own.embed_documents(["a", "b"])) == 2


@client("LangChain", "structured output")
@pytest.mark.parametrize("options", [{}, {"use_responses_api": True}])
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_parses(tool_server: Running, method: str, options: dict[str, Any]) -> None:
    model = chat(tool_server, **options)
    assert isinstance(model.with_structured_output(City, method=method).invoke("a"), City)


@client("LangChain", "tools, whole and streamed")
def test_langchain_calls_tools(tool_server: Running) -> None:
    model = chat(tool_server)
    for choice in ("any", "required", "City", True):
        called = model.bind_tools([City], tool_choice=choice, parallel_tool_calls=False).invoke("a")
        City.model_validate(called.tool_calls[0]["args"])
    assert model.bind_tools([City], tool_choice="none").invoke("a").tool_calls == []
    chunks = list(model.bind_tools([City], tool_choice="City").stream("a"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    City.model_validate(whole.tool_calls[0]["args"])
    called = model.bind_tools([Go], tool_choice="Go").invoke("a")
    result = {"role": "tool", "content": "x", "tool_call_id": called.tool_calls[0]["id"]}
    assert chat(tool_server, max_tokens=4).bind_tools([Go]).invoke([("user", "a"), called, result]).content


@client("instructor", "structured output")
@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "RESPONSES_TOOLS"])
def test_instructor(tool_server: Running, mode: str) -> None:
    instructor: Any = pytest.importorskip("instructor")
    made = instructor.from_openai(tool_server.client(), mode=getattr(instructor.Mode, mode))
    asked: Any = {"model": "tiny", "messages": MESSAGES, "response_model": City, "max_tokens": TOKENS}
    assert isinstance(made.chat.completions.create(**asked, max_retries=0), City)


@client("pydantic-ai", "structured output")
@pytest.mark.parametrize("api", ["OpenAIChatModel", "OpenAIResponsesModel"])
@pytest.mark.parametrize("output", ["ToolOutput", "NativeOutput"])
def test_pydantic_ai(tool_server: Running, api: str, output: str) -> None:
    ai: Any = pytest.importorskip("pydantic_ai")
    agent = ai.Agent(ai_model(tool_server, api), output_type=getattr(ai, output)(City))
    assert isinstance(asyncio.run(agent.run("a", model_settings={"max_tokens": TOKENS})).output, City)


def ai_model(server: Running, api: str) -> Any:
    models: Any = pytest.importorskip("pydantic_ai.models.openai")
    provider: Any = pytest.importorskip("pydantic_ai.providers.openai")
    made = provider.OpenAIProvider(base_url=f"{server.url}/v1", api_key=KEY)
    return getattr(models, api)("tiny", provider=made)


@client("pydantic-ai", "chat, whole and streamed")
@client("pydantic-ai", "tools")
@pytest.mark.parametrize("api", ["OpenAIChatModel", "OpenAIResponsesModel"])
def test_pydantic_ai_chats(tool_server: Running, api: str) -> None:
    ai: Any = pytest.importorskip("pydantic_ai")
    agent = ai.Agent(ai_model(tool_server, api), model_settings={"max_tokens": 9})
    agent.tool_plain(lambda: "x", name="go")

    async def streamed() -> str:
        async with agent.run_stream("a") as run:
            return "".join([piece async for piece in run.stream_text(delta=True)])

    assert asyncio.run(agent.run("a")).output
    assert asyncio.run(streamed())


@client("LlamaIndex", "chat, whole and streamed")
@client("LlamaIndex", "completions")
@client("LlamaIndex", "structured output")
def test_llama_index(tool_server: Running) -> None:
    own: Any = pytest.importorskip("llama_index.llms.openai_like")
    core: Any = pytest.importorskip("llama_index.core")
    options: Any = {"model": "tiny@0.6", "api_base": f"{tool_server.url}/v1", "api_key": KEY, "context_window": 128}
    options |= {"max_tokens": TOKENS, "temperature": 0, "max_retries": 0}
    model = own.OpenAILike(is_chat_model=True, is_function_calling_model=True, **options)
    messages = [core.llms.ChatMessage(role="user", content="a")]
    text = "".join(piece.delta or "" for piece in model.stream_chat(messages))
    assert text == model.chat(messages).message.content
    assert isinstance(model.structured_predict(City, core.PromptTemplate("a")), City)
    assert own.OpenAILike(is_chat_model=False, **options).complete("In").text


@client("Anthropic's client", "messages, whole and streamed")
@client("Anthropic's client", "tools, whole and streamed")
@client("Anthropic's client", "counting tokens")
def test_anthropics(tool_server: Running) -> None:
    anthropic: Any = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=tool_server.url, api_key=KEY, max_retries=0) as own:
        asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "extra_body": {"temperature": 0}}
        whole = own.messages.create(**asked)
        with own.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == whole.content[0].text
            assert stream.get_final_message().usage == whole.usage
        options: Any = {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}, "max_tokens": 60}
        assert own.messages.create(**asked | options).content[0].input == {}
        with own.messages.stream(**asked | options) as stream:
            assert stream.get_final_message().content[0].input == {}
        system = [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]
        count = own.messages.count_tokens(model="tiny", messages=MESSAGES, system=system).input_tokens
        usage = own.messages.create(**asked, system=system).usage
        assert count == usage.input_tokens + usage.cache_read_input_tokens
        ended = own.messages.create(**asked, stop_sequences=[whole.content[0].text.split()[1]])
        assert ended.stop_reason == "stop_sequence"
        with pytest.raises(anthropic.NotFoundError, match="no model"):
            own.messages.create(**asked | {"model": "other"})


@client("Anthropic's client", "structured output, by LangChain")
def test_langchain_by_anthropics(tool_server: Running) -> None:
    langchain: Any = pytest.importorskip("langchain_anthropic")
    model = langchain.ChatAnthropic(model="tiny", base_url=tool_server.url, api_key=KEY, max_tokens=TOKENS)
    assert isinstance(model.with_structured_output(City).invoke("a"), City)


@client("llm", "chat, whole and streamed")
def test_llm(tool_server: Running, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n  model_name: tiny@0.6\n  api_base: {tool_server.url}/v1\n  api_key_name: none\n"
    )
    (tmp_path / "keys.json").write_text('{"none": "a-key"}')
    answers = [
        subprocess.run(
            [sys.executable, "-m", "llm", "a", "-m", "tiny", "-o", "max_tokens", "9", "-o", "temperature", "0", *more],
            # without its plugins, of which the one for SmolLM2 wants llama.cpp
            env=os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for more in ([], ["--no-stream"])
    ]
    assert answers[0] == answers[1] != ""
