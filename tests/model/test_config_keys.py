"""Which keys of `config.json` count: those that stock `transformers` reads in the family, whatever else is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder
from flextron.errors import FlextronError, UnsupportedModelError
from flextron.families.config import FAMILIES, config_from_hf
from tests.checkpoints.families_cases import (
    CASES,
    HEADS,
    LLAMA3,
    LONGROPE,
    NEOX,
    SIZES,
    YARN,
    hf_config_of,
    hf_logits,
    our_logits,
    random_from,
    random_model,
    random_tokens,
    relative_error,
)

FOREIGN: dict[str, Any] = {
    "sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0, "layer_types": ["sliding_attention"] * 3,
    "rotary_pct": 0.5, "rotary_emb_base": 5.0, "rotary_dim": 4, "partial_rotary_factor": 0.5, "rope_theta": 5.0,
    "num_key_value_heads": 1, "head_dim": 4, "n_inner": 7, "intermediate_size": 7, "n_embd": 7, "n_layer": 1,
    "attention_bias": True, "mlp_bias": True, "use_bias": True, "use_parallel_residual": False, "hidden_act": "relu",
    "activation_function": "relu", "rms_norm_eps": 0.1, "layer_norm_eps": 0.1, "layer_norm_epsilon": 0.1,
    "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "use_qk_norm": True, "clip_qkv": 0.1,
    "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 3.0,
    "logit_scale": 0.3, "final_logit_softcapping": 1.0, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 3,
    "no_rope_layers": [0, 0, 0], "num_local_experts": 4, "pretraining_tp": 2, "use_cache": False, "n_ctx": 8,
}  # fmt: skip
"""Keys that some model has, with values that would change the result where they count."""
COUNT_ANYWAY = {
    # transformers takes a Mistral with layer_types for a Ministral
    "mistral": {"layer_types"},
    "gpt_neox": {"head_dim"},
}


def with_keys(case: str, path: Path, keys: dict[str, Any], drop: tuple[str, ...] = ()) -> Path:
    """The case's checkpoint with other entries in its `config.json`."""
    random_model(case).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in drop} | keys
    (path / "config.json").write_text(json.dumps(config))
    return path


def error_against_stock(path: Path) -> float:
    tokens = random_tokens(1, 20)
    stock = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    return relative_error(our_logits(load_decoder(open_pretrained(path)), tokens), hf_logits(stock, tokens))


@pytest.mark.parametrize("case", CASES)
def test_keys_that_a_family_does_not_have_say_nothing(case: str, tmp_path: Path) -> None:
    family = hf_config_of(random_model(case))["model_type"]
    own = FAMILIES[family].keys | COUNT_ANYWAY.get(family, set())
    foreign = {key: value for key, value in FOREIGN.items() if key not in own}
    assert len(foreign) > 15
    assert error_against_stock(with_keys(case, tmp_path, foreign)) <= 1e-5


@pytest.mark.parametrize(
    ("case", "keys", "drop"),
    [
        ("mistral", {"use_sliding_window": False}, ()),
        ("mistral", {"layer_types": ["full_attention"] * 3}, ()),
        ("mistral", {"layer_types": ["sliding_attention"] * 3}, ()),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, ()),
        ("mistral", {"sliding_window": None}, ()),
        ("gpt2", {"scale_attn_weights": False}, ()),
        ("gpt2", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}, ()),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2, "layer_types": None}, ()),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 50.0}}, ()),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, ()),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 0.7}}, ()),
        ("llama", {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}}, ()),
        ("neox", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, ()),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}, ()),
        ("gemma2", {"layer_types": None, "sliding_window_pattern": 3}, ()),
        ("gemma3", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, ()),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 2}, ()),
        ("gemma3", {"rope_theta": 500.0, "rope_local_base_freq": 50.0}, ("rope_parameters",)),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, ("rope_parameters",)),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2, "layer_types": None}, ()),
        ("smollm3", {"use_sliding_window": False, "layer_types": None}, ()),
        ("phi3", {"partial_rotary_factor": 0.75}, ("rope_parameters",)),
        ("phi3-longrope", {"rope_parameters": LONGROPE | {"attention_factor": 1.4}}, ()),
        ("phi3-longrope", {"rope_parameters": LONGROPE | {"rope_type": "su"}}, ()),
        ("stablelm", {"partial_rotary_factor": 0.5}, ("rope_parameters",)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention"] * 3}, ()),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 3}, ()),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3, "layer_types": None}, ()),
        ("llama", {"partial_rotary_factor": 0.5}, ("rope_parameters",)),
        ("llama", {"rotary_pct": 0.5}, ("rope_parameters",)),
        ("llama", {"rope_theta": 500}, ("rope_parameters",)),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 500.0}, ("rope_parameters",)),
        ("llama", {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}}, ("rope_parameters",)),
        ("llama", {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 500.0}, ()),
        ("llama", {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}}, ()),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": None}, ()),
        ("llama-3", {"original_max_position_embeddings": 4}, ()),
        ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 8}, ("rope_parameters",)),
        ("neox", {"rotary_pct": 0.5, "rotary_emb_base": 50}, ("rope_parameters",)),
        ("neox", {"partial_rotary_factor": 1.0, "rope_theta": 5.0}, ("rope_parameters",)),
        ("neox", {"rope_scaling": {"type": "linear", "factor": 4.0}}, ("rope_parameters",)),
        ("neox", {"head_dim": 8}, ()),
        ("neox", {"use_parallel_residual": False}, ()),
        ("gpt2", {"n_ctx": 8, "hidden_size": 32, "intermediate_size": 7}, ()),
        ("gpt2", {"reorder_and_upcast_attn": True}, ()),
        ("llama", {"hidden_act": "swish"}, ()),
        ("llama", {"is_causal": True, "per_layer_config": None, "quantization_config": None}, ()),
        ("llama", {"pad_token_id": -1, "dtype": "bfloat16", "architectures": None}, ()),
        ("llama", {"architectures": ["LlamaModel"]}, ()),
    ],
)
def test_keys_mean_what_they_mean_to_transformers(
    case: str, keys: dict[str, Any], drop: tuple[str, ...], tmp_path: Path
) -> None:
    assert error_against_stock(with_keys(case, tmp_path, keys, drop)) <= 1e-5


@pytest.mark.parametrize(
    ("case", "keys", "named"),
    [
        ("llama", {"is_causal": False}, "is_causal"),
        ("llama", {"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config"),
        ("llama", {"transformers_weights": "other.safetensors"}, "transformers_weights"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            "rope_parameters of each kind of layer",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial"),
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 5.0}}, "'proportional'"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "other than of full_attention and sliding_attention"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "'fp8'"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "'bitsandbytes'"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
        ("llama", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq'"),
        ("llama", {"quantization_config": {"quant_method": "compressed-tensors"}}, "'compressed-tensors'"),
        ("llama", {"compression_config": {"format": "pack-quantized"}}, "quantised"),
    ],
)
def test_keys_that_change_the_result_and_have_no_implementation_are_refused(
    case: str, keys: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        config_from_hf(hf_config_of(random_model(case)) | keys)


@pytest.mark.parametrize(
    ("case", "keys", "named"),
    [
        ("llama", {"num_hidden_layers": 100_000}, "num_hidden_layers"),
        ("llama", {"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ("llama", {"vocab_size": 2**62}, "vocab_size"),
        ("llama", {"vocab_size": -1}, "vocab_size"),
        ("llama", {"vocab_size": "67"}, "vocab_size"),
        ("llama", {"vocab_size": True}, "vocab_size"),
        ("llama", {"head_dim": -8}, "head_dim"),
        ("llama", {"head_dim": 3}, "3 of the 3 dimensions"),
        ("qwen2", {"head_dim": None}, "head_dim of a qwen2 to null"),
        ("neox", {"head_dim": 4}, "4 heads of 4 dimensions"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("llama", {"rope_parameters": {"rope_theta": [3]}}, "rope_theta"),
        ("llama", {"rope_parameters": {"rope_theta": 0.0}}, "rope_theta"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2.0", "rope_theta": 1e4}}, "factor"),
        ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 0.5}}, "high_freq_factor"),
        ("mistral", {"sliding_window": {}}, "sliding_window"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("qwen2", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("llama", {"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 4}, "6 attention heads.*4 key"),
        ("qwen3", {"num_attention_heads": 7, "num_key_value_heads": 2}, "7 attention heads.*2 key"),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 4}, "2 attention heads.*4 key"),
        ("llama", {"architectures": ["Qwen2ForCausalLM"]}, "model_type llama and the architecture Qwen2ForCausalLM"),
        ("llama", {"model_type": []}, "is not supported"),
        ("llama", {"model_type": "\ud800"}, "is not supported"),
    ],
)
def test_values_out_of_bounds_are_named(case: str, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(FlextronError, match=named) as caught:
        config_from_hf(hf_config_of(random_model(case)) | keys)
    str(caught.value).encode()


@pytest.mark.parametrize("document", [[], "x", None, 3, [{"model_type": "llama"}]])
def test_a_config_that_is_no_object(document: Any) -> None:
    with pytest.raises(FlextronError, match=r"config\.json holds no object"):
        config_from_hf(document)


def test_reading_leaves_the_config_as_it_is() -> None:
    config = {**hf_config_of(random_model("llama")), "rope_scaling": {"type": "linear", "factor": 2.0}}
    before = json.dumps(config)
    config_from_hf(config)
    assert json.dumps(config) == before


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
def test_partial_rotation_equals_that_of_transformers(fraction: float, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": fraction}
    random_from(GPTNeoXConfig(**SIZES, **NEOX, rope_parameters=rope)).save_pretrained(tmp_path)
    assert error_against_stock(tmp_path) <= 1e-5


def test_an_absent_pair_of_heads_follows_the_family(tmp_path: Path) -> None:
    random_from(LlamaConfig(**SIZES | HEADS | {"num_key_value_heads": None})).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": None}))
    assert error_against_stock(tmp_path) <= 1e-5
