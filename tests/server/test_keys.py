"""The table of keys, walked through: what is served, ignored, refused, against OpenAI's own types and vLLM's names."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai.types import completion_create_params as completion_types
from openai.types import embedding_create_params as embedding_types
from openai.types.chat import completion_create_params as chat_types
from openai.types.responses import response_create_params as response_types

from flextron.dialects.messages_body import MessagesBody
from flextron.dialects.responses_body import ResponsesBody
from flextron.protocols.bodies import ChatBody, CompletionBody
from flextron.protocols.embeddings import EmbeddingBody
from flextron.protocols.keys import KEYS, Does, Key
from tests.server.running import Running
from tests.server.test_refusals import assert_refused

BODIES: dict[str, dict[str, Any]] = {
    "responses": {"model": "tiny", "input": "a", "max_output_tokens": 1},
    "messages": {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "completions": {"model": "tiny", "prompt": "a", "max_tokens": 1},
    "chat": {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "embeddings": {"model": "tiny", "input": "a"},
}
PATHS = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "embeddings": "/v1/embeddings",
}
SERVED = {
    "completions": CompletionBody,
    "chat": ChatBody,
    "responses": ResponsesBody,
    "messages": MessagesBody,
    "embeddings": EmbeddingBody,
}
CLIENT = httpx.Client(timeout=30)
VALUES: list[Any] = [True, False, 0, 1, -1, 0.5, 2, "a", "none", [], ["a"], [1], {}, {"a": 1}]
VLLM = {
    *("watermarking", "logprob_token_ids", "session_id", "request_id", "ec_transfer_params", "kv_transfer_params"),
    *("return_token_offsets", "return_mm_kwargs", "cache_salt", "vllm_xargs", "repetition_detection"),
    *("routed_experts_prompt_start", "thinking_token_budget", "stream_interval", "return_tokens_as_token_ids"),
    *("ignore_eos", "spaces_between_special_tokens", "truncation_side", "response_format", "user"),
    *("top_k", "min_p", "repetition_penalty", "stop_token_ids", "min_tokens", "bad_words", "allowed_token_ids"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "prompt_logprobs"),
    *("include_stop_str_in_output", "skip_special_tokens", "truncate_prompt_tokens", "logits_processors"),
    *("use_beam_search", "length_penalty", "add_special_tokens", "return_token_ids", "priority"),
}
"""What vLLM's bodies of completions and chats have in common, beside OpenAI's own keys."""
VLLM_MORE = {
    "completions": {"prompt_embeds"},
    "chat": {
        *("chat_template", "chat_template_kwargs", "continue_final_message", "add_generation_prompt", "documents"),
        *("echo", "include_reasoning", "media_io_kwargs", "mm_processor_kwargs", "return_prompt_text"),
    },
    "responses": {
        *("logit_bias", "top_k", "skip_special_tokens", "include_stop_str_in_output", "request_id", "seed", "stop"),
        *("mm_processor_kwargs", "priority", "cache_salt", "enable_response_messages", "previous_input_messages"),
        *("previous_response", "structured_outputs", "repetition_penalty", "ignore_eos", "vllm_xargs"),
    },
    "messages": {"kv_transfer_params", "chat_template_kwargs"},
    "embeddings": {
        *("truncate_prompt_tokens", "padding", "truncation_side", "request_id", "priority", "mm_processor_kwargs"),
        *("cache_salt", "add_special_tokens", "embed_dtype", "endianness", "use_activation", "messages"),
        *("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs"),
        *("media_io_kwargs", "encoding_format", "dimensions"),
    },
}
ANTHROPIC = {
    *("max_tokens", "messages", "model", "cache_control", "container", "diagnostics", "inference_geo", "metadata"),
    *("output_config", "service_tier", "speed", "stop_sequences", "system", "thinking", "tool_choice", "tools"),
    *("user_profile_id", "workspace_id", "stream", "temperature", "top_p", "top_k"),
}
ENTRIES = [pytest.param(e, key, id=f"{e}-{key.name}") for e, table in KEYS.items() for key in table.values()]


def ask(server: Running, endpoint: str, **changes: Any) -> httpx.Response:
    return CLIENT.post(server.url + PATHS[endpoint], json=BODIES[endpoint] | changes)


def assert_bad(answer: httpx.Response, param: str, code: str) -> None:
    error = assert_refused(answer, 400, param)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


def is_same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def test_the_table_has_all_keys_of_openai_and_vllm() -> None:
    for endpoint, types in (("completions", completion_types), ("chat", chat_types)):
        params = types.CompletionCreateParamsBase, types.CompletionCreateParamsStreaming
        names = {name for kind in params for name in kind.__annotations__}
        assert len(names) > 15
        assert names <= KEYS[endpoint].keys()
        assert KEYS[endpoint].keys() >= VLLM
    for endpoint, names in VLLM_MORE.items():
        assert names <= KEYS[endpoint].keys()
    assert KEYS["messages"].keys() >= ANTHROPIC
    assert embedding_types.EmbeddingCreateParams.__annotations__.keys() <= KEYS["embeddings"].keys()
    kinds = response_types.ResponseCreateParamsBase, response_types.ResponseCreateParamsStreaming
    assert {name for kind in kinds for name in kind.__annotations__} <= KEYS["responses"].keys()


@pytest.mark.parametrize("endpoint", KEYS)
def test_what_is_served_is_what_bodies_have(endpoint: str) -> None:
    served = {name for name, key in KEYS[endpoint].items() if key.does is Does.SERVE}
    assert served == SERVED[endpoint].model_fields.keys()


@pytest.mark.parametrize(("endpoint", "key"), ENTRIES)
def test_each_key(chat_server: Running, endpoint: str, key: Key) -> None:
    """One request a kind of value; neutral ones at once with null."""
    if key.does is Does.SERVE:
        return
    assert ask(chat_server, endpoint, **{key.name: None}).status_code == 200
    if key.does is Does.IGNORE:
        assert not key.neutral
        for value in VALUES[::7]:
            assert ask(chat_server, endpoint, **{key.name: value}).status_code == 200
        return
    for value in key.neutral:
        assert ask(chat_server, endpoint, **{key.name: value}).status_code == 200
    for value in VALUES:
        if not any(is_same(value, other) for other in key.neutral):
            assert_bad(ask(chat_server, endpoint, **{key.name: value}), key.name, "unsupported_parameter")


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_all_neutral_values_at_once(chat_server: Running, endpoint: str) -> None:
    neutral = {key.name: key.neutral[-1] for key in KEYS[endpoint].values() if key.neutral}
    assert len(neutral) > 40
    answer = ask(chat_server, endpoint, **neutral, temperature=0)
    assert answer.json()["choices"] == ask(chat_server, endpoint, temperature=0).json()["choices"]


@pytest.mark.parametrize("endpoint", KEYS)
@pytest.mark.parametrize("name", ["topk", "max_token", "", "é" * 200, "stream_option"])
def test_unknown_keys_are_refused(chat_server: Running, endpoint: str, name: str) -> None:
    assert_bad(ask(chat_server, endpoint, **{name: 1}), name[:100], "unknown_parameter")


def test_keys_within_keys(chat_server: Running) -> None:
    stream = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": True}}
    assert ask(chat_server, "chat", **stream).status_code == 200
    stream["stream_options"] = {"every": 1}
    assert_bad(ask(chat_server, "chat", **stream), "stream_options.every", "unknown_parameter")
    assert_bad(ask(chat_server, "chat", flextron={"width": 1}), "flextron.width", "unknown_parameter")
