"""Keys of requests, against the request types of OpenAI's client, vLLM's and Anthropic's."""

from __future__ import annotations

from collections import Counter

from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from benchmarks.harness import Figure
from flextron.protocols.keys import KEYS
from tests.server.test_keys import ANTHROPIC, VLLM, VLLM_MORE

__all__ = ["unknown_keys"]


def unknown_keys() -> Figure:
    """Keys of the request types of OpenAI, vLLM and Anthropic that the server has no rule for."""
    kinds = {
        "completions": (completion_create_params.CompletionCreateParamsBase,),
        "chat": (chat_create_params.CompletionCreateParamsBase, chat_create_params.CompletionCreateParamsStreaming),
        "responses": (response_create_params.ResponseCreateParamsBase,),
        "embeddings": (embedding_create_params.EmbeddingCreateParams,),
    }
    asked = {(e, name) for e, own in kinds.items() for kind in own for name in kind.__annotations__}
    asked |= {(e, name) for e in ("completions", "chat") for name in VLLM}
    asked |= {(e, name) for e, names in VLLM_MORE.items() for name in names} | {("messages", n) for n in ANTHROPIC}
    missing = [name for endpoint, name in asked if name not in KEYS[endpoint]]
    rules = Counter(key.does.value for table in KEYS.values() for key in table.values())
    return Figure(
        name="keys of OpenAI, vLLM and Anthropic that are neither served, harmless, nor refused by name",
        value=len(missing),
        unit="keys",
        op="==",
        bar=0,
        note=f"{len(asked)} keys; the tables hold {dict(rules)} with those of llama-server and others",
    )
