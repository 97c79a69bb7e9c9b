"""What becomes of each key of a request's body: one table for OpenAI's keys, vLLM's, llama-server's and others'.

A key that changes answers is served or refused, never dropped. Refused ones are taken with the values that change
nothing, so that clients may spell out their defaults. Keys that change no answer are ignored. Keys that are not in the
table are refused, as OpenAI refuses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from flextron.serving.errors import ApiError

__all__ = ["KEYS", "Does", "Key", "check_keys", "is_neutral", "unknown_key", "unsupported"]


class Does(Enum):
    """What the server does with a key."""

    SERVE = "serve"
    IGNORE = "ignore"
    """It changes no answer."""
    REFUSE = "refuse"
    """Unless its value is a neutral one, or null."""


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of the table."""

    name: str
    does: Does
    neutral: tuple[Any, ...] = ()
    """Values that change nothing."""
    origin: str = "openai"
    """Whose key it is."""


def _keys(origin: str, does: Does, *names: str) -> list[Key]:
    return [Key(name, does, (), origin) for name in names]


def _refused(origin: str, /, **neutral: tuple[Any, ...]) -> list[Key]:
    return [Key(name, Does.REFUSE, values, origin) for name, values in neutral.items()]


_SAMPLING = [
    *_keys("openai", Does.SERVE, "temperature", "top_p", "seed", "stop"),
    *_keys("openai", Does.SERVE, "frequency_penalty", "presence_penalty", "logit_bias"),
    *_keys("vllm", Does.SERVE, "ignore_eos", "top_k", "min_p", "repetition_penalty", "allowed_token_ids", "bad_words"),
    *_keys("vllm", Does.SERVE, "stop_token_ids", "include_stop_str_in_output", "min_tokens", "skip_special_tokens"),
]

_BOTH = [
    *_keys("openai", Does.SERVE, "model", "stream", "stream_options", "max_tokens", "n", "logprobs"),
    *_SAMPLING,
    *_keys("flextron", Does.SERVE, "flextron"),
    *_keys("vllm", Does.SERVE, "add_special_tokens"),
    *_keys("openai", Does.SERVE, "response_format"),
    *_keys("vllm", Does.SERVE, "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object"),
    *_keys("vllm", Does.SERVE, "structured_outputs"),
    *_keys("llama-server", Does.SERVE, "json_schema", "grammar"),
    *_keys("vllm", Does.SERVE, "prompt_logprobs", "return_token_ids"),
    *_keys("openai", Does.IGNORE, "user", "metadata", "store", "service_tier", "safety_identifier"),
    *_keys("openai", Does.IGNORE, "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "prediction"),
    *_keys("vllm", Does.IGNORE, "request_id", "session_id", "stream_interval", "return_token_offsets"),
    *_keys("vllm", Does.IGNORE, "return_mm_kwargs"),
    *_refused(
        "vllm",
        watermarking=(False,),
        logprob_token_ids=(),
        routed_experts_prompt_start=(0,),
        ec_transfer_params=({},),
        use_beam_search=(False,),
        length_penalty=(1,),
        early_stopping=(False,),
        spaces_between_special_tokens=(True,),
        truncate_prompt_tokens=(),
        truncation_side=(),
        guided_decoding_backend=(),
        guided_whitespace_pattern=(),
        structural_tag=(),
        priority=(0,),
        logits_processors=([],),
        return_tokens_as_token_ids=(False,),
        max_repetition_pattern_size=(0,),
        min_repetition_pattern_size=(0,),
        repetition_min_count=(0,),
        repetition_detection=(),
        cache_salt=(),
        kv_transfer_params=({},),
        vllm_xargs=({},),
        thinking_token_budget=(),
    ),
    *_keys("llama-server", Does.IGNORE, "cache_prompt", "id_slot", "n_cache_reuse", "sse_ping_interval"),
    # of samplers that are refused unless they are off
    *_keys("llama-server", Does.IGNORE, "repeat_last_n", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
    *_keys("llama-server", Does.IGNORE, "dry_sequence_breakers", "xtc_threshold", "mirostat_tau", "mirostat_eta"),
    *_refused(
        "llama-server",
        n_predict=(),
        n_probs=(0,),
        n_keep=(0,),
        n_discard=(0,),
        n_indent=(0,),
        n_cmpl=(1,),
        dynatemp_range=(0,),
        dynatemp_exponent=(1,),
        typical_p=(1,),
        repeat_penalty=(1,),
        dry_multiplier=(0,),
        xtc_probability=(0,),
        mirostat=(0,),
        top_n_sigma=(-1,),
        min_keep=(0,),
        samplers=(),
        grammar_lazy=(False,),
        grammar_triggers=([],),
        t_max_predict_ms=(0, -1),
        return_tokens=(False,),
        return_progress=(False,),
        timings_per_token=(False,),
        post_sampling_probs=(False,),
        response_fields=([],),
        lora=([],),
    ),
    *_keys("ollama", Does.IGNORE, "keep_alive"),
    *_refused(
        "ollama",
        options=({},),
        format=("",),
        think=(),
        raw=(False,),
        template=("",),
        system=("",),
        context=([],),
        images=([],),
        num_ctx=(),
        num_predict=(),
        tfs_z=(1,),
    ),
    *_refused(
        "others",
        top_a=(0,),
        min_new_tokens=(0,),
        max_new_tokens=(),
        no_repeat_ngram_size=(0,),
        do_sample=(),
        regex=(),
        ebnf=(),
        lora_path=(),
        stop_regex=(),
        no_stop_trim=(False,),
        custom_logit_processor=(),
        models=(),
        transforms=([],),
        plugins=([],),
        extra_body=({},),
    ),
]

_COMPLETIONS = [
    *_keys("openai", Does.SERVE, "prompt", "best_of", "echo"),
    *_refused("openai", suffix=("",)),
    *_refused("vllm", prompt_embeds=()),
    *_refused("llama-server", input_prefix=("",), input_suffix=("",), input_extra=([],)),
]

_CHAT = [
    *_keys("openai", Does.SERVE, "messages", "max_completion_tokens", "top_logprobs"),
    *_keys("openai", Does.SERVE, "tools", "tool_choice", "parallel_tool_calls"),
    *_keys("vllm", Does.SERVE, "add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
    *_refused(
        "openai",
        functions=([],),
        function_call=("none", "auto"),
        modalities=(["text"],),
        audio=(),
        web_search_options=(),
        reasoning_effort=("none",),
        verbosity=("medium",),
        moderation=(),
    ),
    *_refused(
        "vllm",
        best_of=(1,),
        echo=(False,),
        documents=([],),
        chat_template=(),
        mm_processor_kwargs=({},),
        media_io_kwargs=({},),
        include_reasoning=(True,),
        return_prompt_text=(False,),
    ),
    *_refused(
        "llama-server",
        reasoning_format=("none",),
        reasoning_in_content=(False,),
        thinking_forced_open=(False,),
        parse_tool_calls=(False,),
        reasoning_budget=(-1,),
    ),
    *_refused("others", reasoning=(), thinking=(), enable_thinking=(), separate_reasoning=(), stream_reasoning=()),
]

_RESPONSES = [
    *_keys("openai", Does.SERVE, "model", "input", "instructions", "max_output_tokens"),
    *_keys("openai", Does.SERVE, "stream", "text", "tools", "tool_choice", "parallel_tool_calls", "metadata"),
    *_SAMPLING,
    *_keys("flextron", Does.SERVE, "flextron"),
    *_keys("openai", Does.IGNORE, "user", "store", "service_tier", "safety_identifier"),
    *_keys("openai", Does.IGNORE, "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    *_keys("openai", Does.IGNORE, "stream_options"),
    *_keys("vllm", Does.IGNORE, "request_id"),
    *_refused(
        "vllm",
        mm_processor_kwargs=({},),
        priority=(0,),
        cache_salt=(),
        enable_response_messages=(False,),
        previous_input_messages=(),
        previous_response=(),
        structured_outputs=(),
        vllm_xargs=({},),
    ),
    *_refused(
        "openai",
        previous_response_id=(),
        conversation=(),
        prompt=(),
        background=(False,),
        background_options=(),
        access_programs=([],),
        image=(),
        context_management=([],),
        # there is no reasoning that could be included
        include=([], ["reasoning.encrypted_content"]),
        max_tool_calls=(),
        moderation=(),
        reasoning=({},),
        top_logprobs=(0,),
        truncation=("disabled",),
    ),
]

_MESSAGES = [
    *_keys("anthropic", Does.SERVE, "model", "messages", "max_tokens", "system", "stop_sequences", "temperature"),
    *_keys("anthropic", Does.SERVE, "top_p", "top_k", "stream", "tools", "tool_choice"),
    *_keys("flextron", Does.SERVE, "flextron"),
    *_keys("anthropic", Does.SERVE, "output_config"),
    *_keys("anthropic", Does.IGNORE, "metadata", "service_tier", "cache_control", "inference_geo", "speed"),
    *_keys("anthropic", Does.IGNORE, "user_profile_id", "workspace_id"),
    *_refused("anthropic", thinking=({"type": "disabled"},), output_format=(), diagnostics=({},)),
    *_refused("anthropic", container=(), mcp_servers=([],), context_management=()),
    *_refused("vllm", chat_template_kwargs=({},), kv_transfer_params=({},)),
]

_EMBEDDINGS = [
    *_keys("openai", Does.SERVE, "model", "input", "encoding_format", "dimensions"),
    *_keys("flextron", Does.SERVE, "flextron", "pooling"),
    *_keys("vllm", Does.SERVE, "add_special_tokens", "normalize"),
    *_keys("openai", Does.IGNORE, "user"),
    *_keys("vllm", Does.IGNORE, "request_id"),
    *_keys("ollama", Does.IGNORE, "keep_alive"),
    *_refused(
        "vllm",
        messages=(),
        truncate_prompt_tokens=(),
        truncation_side=(),
        priority=(0,),
        padding=("do_not_pad",),
        use_activation=(),
        embed_dtype=("float32",),
        endianness=("native", "little"),
        chat_template=(),
        chat_template_kwargs=({},),
        add_generation_prompt=(False,),
        continue_final_message=(False,),
        mm_processor_kwargs=({},),
        media_io_kwargs=({},),
        cache_salt=(),
    ),
    *_refused("llama-server", content=(), embd_normalize=(2,)),
    *_refused("ollama", prompt=(), options=({},), truncate=()),
    *_refused("others", input_type=(), prompt_name=(), instruction=("",), task=(), embedding_type=("float",)),
]

KEYS: dict[str, dict[str, Key]] = {
    endpoint: {key.name: key for key in own}
    for endpoint, own in (
        ("completions", [*_BOTH, *_COMPLETIONS]),
        ("chat", [*_BOTH, *_CHAT]),
        ("responses", _RESPONSES),
        ("messages", _MESSAGES),
        ("embeddings", _EMBEDDINGS),
    )
}
"""What happens to each key, by endpoint and name."""


def check_keys(body: Mapping[str, Any], endpoint: str) -> dict[str, Any]:
    """Those keys of a body that are served.

    Raises:
        ApiError: another one would change the answer, or is unknown.
    """
    table, served = KEYS[endpoint], {}
    for name, value in body.items():
        key = table.get(name)
        if key is None:
            raise unknown_key(name)
        if key.does is Does.SERVE:
            served[name] = value
        elif key.does is Does.REFUSE and value is not None and not is_neutral(value, key.neutral):
            raise unsupported(name)
    return served


def is_neutral(value: Any, neutral: Iterable[Any]) -> bool:
    """Whether a value is one of these; no number is true or false, and an object of nulls says nothing."""
    if isinstance(value, dict) and value and all(entry is None for entry in value.values()):
        value = {}
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)


def unsupported(name: str) -> ApiError:
    """400: a key would change the answer."""
    message = f"{name} is not supported by this server; leave it out"
    return ApiError(400, message, param=name, code="unsupported_parameter")


def unknown_key(name: str) -> ApiError:
    """400: nobody knows what the key would change."""
    message = f"{name[:100]} is no key that this server knows; leave it out"
    return ApiError(400, message, param=name[:100], code="unknown_parameter")
