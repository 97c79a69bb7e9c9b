"""Writing GGUF files by llama.cpp's conversion rules, row by row from their description: the tests' reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Arrays = dict[str, np.ndarray]

# Hugging Face's module names and GGUF's, as the format's documentation lists them.
OUTER = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output",
}  # fmt: skip
INNER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
}  # fmt: skip


def gguf_name(hf_name: str, *, post_norm: bool = False) -> str:
    module, kind = hf_name.rsplit(".", 1)
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    _, layer, rest = module.split(".", 1)[1].split(".", 2)
    if post_norm and rest == "post_attention_layernorm":
        return f"blk.{layer}.post_attention_norm.{kind}"
    return f"blk.{layer}.{INNER[rest]}.{kind}"


def forward_order(name: str, config: PretrainedConfig) -> list[int] | None:
    """Which row of Hugging Face's tensor each row of the file's is; None where they are the same."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if config.model_type in ("llama", "mistral", "granite", "smollm3") and (".q_proj." in name or ".k_proj." in name):
        n = heads if ".q_proj." in name else config.num_key_value_heads
        return [h * dim + half * dim // 2 + j for h in range(n) for j in range(dim // 2) for half in (0, 1)]
    if ".query_key_value." in name:
        return [(h * 3 + part) * dim + j for part in range(3) for h in range(heads) for j in range(dim)]
    return None


def to_gguf(tensors: Mapping[str, torch.Tensor], config: PretrainedConfig) -> Arrays:
    out = {}
    for name, tensor in tensors.items():
        order = forward_order(name, config)
        rows = tensor if order is None else tensor[order]
        if config.model_type == "gpt2" and ".c_" in name and tensor.dim() == 2:
            rows = rows.T
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            rows = rows + 1
        post_norm = config.model_type in ("gemma2", "gemma3_text", "olmo2")
        out[gguf_name(name, post_norm=post_norm)] = rows.contiguous().numpy()
    if "longrope" in str(getattr(config, "rope_parameters", "")):
        for length in ("long", "short"):
            factors = config.rope_parameters[f"{length}_factor"]
            out[f"rope_factors_{length}.weight"] = np.array(factors, dtype=np.float32)
    if "llama3" in str(getattr(config, "rope_parameters", "")):
        base = config.rope_parameters["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        out["rope_freqs.weight"] = (base / scaled).numpy()
    return out


def fields_of(config: PretrainedConfig) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes, without the architecture's prefix."""
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or config.n_inner or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }
    if config.model_type == "gpt2":
        return fields | {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        fields["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    fields["rope.freq_base"] = rope["rope_theta"]
    if rope["rope_type"] == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if config.model_type == "gpt_neox":
        fields["attention.layer_norm_epsilon"] = config.layer_norm_eps
        fields["use_parallel_residual"] = config.use_parallel_residual
        head_dim = config.hidden_size // config.num_attention_heads
        return fields | {"rope.dimension_count": int(head_dim * rope["partial_rotary_factor"])}
    fields["attention.head_count_kv"] = config.num_key_value_heads
    fields |= _own_fields(config, rope)
    if config.model_type == "stablelm":
        return fields | {"attention.layer_norm_epsilon": config.layer_norm_eps}
    fields["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if head_dim := getattr(config, "head_dim", None):
        fields["attention.key_length"] = head_dim
    return fields


def _own_fields(config: PretrainedConfig, rope: dict[str, Any]) -> dict[str, Any]:
    """What only some architectures have."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type in ("phi3", "stablelm"):
        fields = {"rope.dimension_count": int(head_dim * rope["partial_rotary_factor"])}
        if config.model_type == "phi3":
            fields["attention.sliding_window"] = config.sliding_window or 0
        if rope["rope_type"] == "longrope":
            original = config.original_max_position_embeddings
            scale = config.max_position_embeddings / original
            fields["rope.scaling.original_context_length"] = original
            fields["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
        return fields
    if config.model_type == "granite":
        return {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if config.model_type not in ("gemma2", "gemma3_text"):
        return {}
    fields = {"attention.sliding_window": config.sliding_window, "attention.value_length": config.head_dim}
    if config.model_type == "gemma2":
        fields["attn_logit_softcapping"] = config.attn_logit_softcapping
        fields["final_logit_softcapping"] = config.final_logit_softcapping
    return fields


def write_gguf(
    path: Path,
    arch: str,
    fields: Mapping[str, Any],
    arrays: Arrays,
    quantize: Iterable[str] = (),
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in fields.items():
        full = key if key.startswith(("tokenizer.", "split.", "general.")) else f"{arch}.{key}"
        adders[type(value)](full, value)
    for name, array in arrays.items():
        own = kind if name in quantize else None
        writer.add_tensor(name, array if own is None else gguf.quants.quantize(array, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
