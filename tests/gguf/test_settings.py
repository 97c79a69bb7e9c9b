"""Settings in a GGUF file's metadata: all that changes the result is read or refused; and round trips in all types.

What a key means, and what holds where it is left out, is taken from llama.cpp's loader.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

from flextron.checkpoints.weights import load_decoder
from flextron.errors import FlextronError, UnsupportedModelError
from flextron.gguf.checkpoint import open_gguf
from flextron.gguf.keys import _KNOWN, _READ, _SILENT
from tests.checkpoints.families_cases import CASES, hf_logits, our_logits, random_from, random_tokens
from tests.gguf.writing import Arrays, fields_of, to_gguf, write_gguf

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, torch.float32),
    "f16": (gguf.GGMLQuantizationType.F16, torch.float16),
    "bf16": (gguf.GGMLQuantizationType.BF16, torch.bfloat16),
}
FAMILIES = (
    *("llama", "llama-3", "llama-linear", "llama-mqa", "mistral", "qwen2", "qwen3"),
    *("gpt2", "neox", "neox-sequential"),
)
ARCHITECTURES = {"mistral": "llama", "gpt_neox": "gptneox"}


def parts(config: PretrainedConfig) -> tuple[str, dict[str, Any], Arrays, PreTrainedModel]:
    """Architecture, metadata, arrays and the model that they are of."""
    model = random_from(config)
    named = {name: p.detach() for name, p in model.named_parameters()}  # a tied head occurs once
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    return arch, fields_of(config), to_gguf(named, config), model


def with_changes(folder: Path, case: str = "llama", **changes: Any) -> Path:
    """A file of one of the cases with some keys changed, `__` for a point in them; None takes one out."""
    arch, fields, arrays, _ = parts(CASES[case])
    fields |= {key.replace("__", "."): value for key, value in changes.items()}
    return write_gguf(folder / "m.gguf", arch, {k: v for k, v in fields.items() if v is not None}, arrays)


def logits_of(path: Path) -> torch.Tensor:
    """As the product computes them."""
    with torch.no_grad():
        return our_logits(load_decoder(open_gguf(path)), random_tokens(2, 12))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", FAMILIES)
def test_round_trips_give_the_logits_of_transformers(case: str, tied: bool, kind: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"tie_word_embeddings": tied, "sliding_window": None}
    if case == "neox-sequential":
        changes["hidden_act"] = "gelu"  # files do not name the activation
    config = type(CASES[case])(**CASES[case].to_dict() | changes)
    arch, fields, arrays, model = parts(config)
    assert ("output.weight" in arrays) is not tied
    # norms and biases stay in 32 bits, as the converter leaves them
    matrices = [name for name, array in arrays.items() if array.ndim == 2]
    path = write_gguf(tmp_path / "m.gguf", arch, fields, arrays, matrices, TYPES[kind][0])
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.to(TYPES[kind][1]).float()
    tokens = random_tokens(2, 12)
    wanted = hf_logits(model, tokens)
    torch.testing.assert_close(logits_of(path), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


CHANGING: dict[str, Any] = {
    "rope.dimension_count": 4, "rope.scaling.type": "yarn", "rope.scaling.attn_factor": 1.2, "rope.scaling.alpha": 2.0,
    "rope.dimension_sections": [2, 2, 0, 0], "attention.scale": 0.5, "attention.clamp_kqv": 3.0,
    "attention.max_alibi_bias": 8.0, "attention.causal": False, "attention.sliding_window": 5,
    "attention.value_length": 16, "attention.q_lora_rank": 8, "attention.kv_lora_rank": 8,
    "attention.relative_buckets_count": 32, "attention.temperature_scale": 0.1, "attention.output_scale": 0.5,
    "attention.shared_kv_layers": 1, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "logit_scale": 0.5, "residual_scale": 0.22, "embedding_scale": 12.0, "expert_count": 8, "expert_used_count": 2,
    "expert_shared_count": 1, "expert_weights_scale": 2.5, "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 2, "use_parallel_residual": True, "swin_norm": True, "nextn_predict_layers": 1,
    "tensor_data_layout": "reference", "full_attention_interval": 4, "rescale_every_n_layers": 6,
    "embedding_length_out": 16, "attention.head_count": [4, 4, 2], "attention.head_count_kv": [2, 1, 2],
    "feed_forward_length": [40, 40, 24],
}  # fmt: skip


WORDS = {
    "rope.scaling.type": "yarn",
    "attention.causal": "causal",
    "attention.scale": "scales attention scores",
    "attention.sliding_window": "sliding window",
    "attention.value_length": "keys and values",
    "use_parallel_residual": "parallel residuals",
    "embedding_length_out": "outputs of another size",
}
"""What the refusal says instead of the key."""


@pytest.mark.parametrize("key", CHANGING)
def test_keys_that_change_the_result_are_refused_by_name(key: str, tmp_path: Path) -> None:
    with pytest.raises(FlextronError) as raised:
        open_gguf(with_changes(tmp_path, **{key: CHANGING[key]}))
    assert WORDS.get(key, f"llama.{key}") in str(raised.value)


NEUTRAL: dict[str, Any] = {
    "rope.dimension_count": 8, "rope.scaling.type": "none", "rope.scaling.factor": 0.0, "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0, "rope.scaling.original_context_length": 32, "rope.scaling.finetuned": True,
    "attention.scale": 8**-0.5, "attention.clamp_kqv": 0.0, "attention.causal": True, "attention.sliding_window": 64,
    "attention.key_length": 8, "attention.value_length": 8, "attention.layer_norm_epsilon": 0.1,
    "logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 0.0, "expert_count": 0, "vocab_size": 67,
    "use_parallel_residual": False, "tensor_data_layout": "Meta AI original pth", "pooling_type": 3,
    "embedding_length_out": 32, "attention.head_count": [4, 4, 4], "attention.head_count_kv": [2, 2, 2],
    "feed_forward_length": [40, 40, 40], "rope.freq_base": None,
}  # fmt: skip


def test_keys_that_change_nothing_are_allowed(tmp_path: Path) -> None:
    tokens = random_tokens(2, 12)
    wanted = hf_logits(random_from(CASES["llama"]), tokens)
    for key, value in NEUTRAL.items():
        found = logits_of(with_changes(tmp_path, **{key: value}))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4, msg=key)


def test_every_key_of_the_package_is_read_silent_or_refused(tmp_path: Path) -> None:
    """None is passed over: set to a number that nothing else has, each is refused unless it is known to be harmless."""
    for key in sorted(_KNOWN - _READ - _SILENT):
        if "{" not in key:
            with pytest.raises(UnsupportedModelError, match=key.replace(".", r"\.")):
                open_gguf(with_changes(tmp_path, **{key: 77}))


def test_an_unknown_key_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "flextron.model"):
        open_gguf(with_changes(tmp_path, brand_new=1))
    assert "llama.brand_new" in caplog.text


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
@pytest.mark.parametrize("kind", [None, "linear"])
def test_a_linear_factor_counts_with_or_without_its_type(key: str, kind: str | None, tmp_path: Path) -> None:
    tokens, config = random_tokens(2, 12), LlamaConfig(**CASES["llama-linear"].to_dict())
    model = random_from(config)
    arch, fields, arrays, _ = parts(config)
    fields |= {"rope.scaling.factor": None, "rope.scaling.type": kind, key: 4.0}
    path = write_gguf(tmp_path / "m.gguf", arch, {k: v for k, v in fields.items() if v is not None}, arrays)
    torch.testing.assert_close(logits_of(path), hf_logits(model, tokens), rtol=0, atol=1e-4)


def test_a_factor_beside_factors_of_each_frequency_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="both at once"):
        open_gguf(with_changes(tmp_path, "llama-3", rope__scaling__factor=4.0))


def test_rope_factors_of_the_wrong_number_or_sign_are_refused(tmp_path: Path) -> None:
    arch, fields, arrays, _ = parts(CASES["llama-3"])
    for factors in (np.ones(4, np.float32), np.zeros(6, np.float32), np.full(6, np.nan, np.float32)):
        with pytest.raises(FlextronError, match="factor above 0 for each of 6"):
            open_gguf(write_gguf(tmp_path / "m.gguf", arch, fields, arrays | {"rope_freqs.weight": factors}))
    arch, fields, arrays, _ = parts(CASES["qwen2"])
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        open_gguf(write_gguf(tmp_path / "m.gguf", arch, fields, arrays | {"rope_freqs.weight": np.ones(4, np.float32)}))


@pytest.mark.parametrize("rotated", [2, 4, 6, 8, None])
def test_neox_rotates_what_the_file_says(rotated: int | None, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": (rotated or 8) / 8}
    config = type(CASES["neox"])(**CASES["neox"].to_dict() | {"rope_parameters": rope})
    arch, fields, arrays, model = parts(config)
    fields |= {"rope.dimension_count": rotated}
    path = write_gguf(tmp_path / "m.gguf", arch, {k: v for k, v in fields.items() if v is not None}, arrays)
    tokens = random_tokens(2, 12)
    torch.testing.assert_close(logits_of(path), hf_logits(model, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rotated", [3, 10])
def test_neox_cannot_rotate_odd_or_too_many_dimensions(rotated: int, tmp_path: Path) -> None:
    with pytest.raises(FlextronError, match=f"cannot rotate {rotated}"):
        open_gguf(with_changes(tmp_path, "neox", rope__dimension_count=rotated))


def test_a_missing_bias_beside_others_is_zero(tmp_path: Path) -> None:
    """As in Qwen's first models, which were converted as Llamas: biases of queries, keys and values alone."""
    arch, fields, arrays, model = parts(CASES["llama-3"])
    gone = [n for n in arrays if n.endswith(".bias") and not n.startswith(("blk.0.attn_q", "blk.1.ffn_up"))]
    path = write_gguf(tmp_path / "m.gguf", arch, fields, {n: a for n, a in arrays.items() if n not in gone})
    kept = ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not any(k in name for k in kept):
            parameter.data.zero_()
    tokens = random_tokens(2, 12)
    torch.testing.assert_close(logits_of(path), hf_logits(model, tokens), rtol=0, atol=1e-4)


SENSELESS: dict[str, list[Any]] = {
    "block_count": [0, 10**6, 2, 4, 2**31, None, "3", -1], "attention.head_count": [0, None, "4", 3, 64, True],
    "attention.head_count_kv": [3, 0, 8, 1, "2"], "embedding_length": [0, 31, 2**31, None, 32.0],
    "feed_forward_length": [0, 2**31 - 1, None], "context_length": [0, None, 2**31, "64"],
    "attention.key_length": [0, 7, 2**31 - 1], "attention.layer_norm_rms_epsilon": [None, -1.0, float("nan"), "x", 0.0],
    "rope.freq_base": [0.0, -1.0, float("nan"), float("inf"), "x"], "rope.scaling.type": [7],
    "rope.scaling.factor": [-1.0, [1.0, 2.0], float("nan"), "x"],
    "attention.causal": ["x"], "attention.sliding_window": [-1, "x"],
}  # fmt: skip


@pytest.mark.parametrize("key", SENSELESS)
def test_numbers_without_sense_are_refused_before_anything_is_built(key: str, tmp_path: Path) -> None:
    arch, fields, arrays, _ = parts(CASES["llama"])
    for value in SENSELESS[key]:
        changed = {k: v for k, v in (fields | {key: value}).items() if v is not None}
        write_any(tmp_path / "m.gguf", arch, changed, arrays)
        with pytest.raises(FlextronError):
            open_gguf(tmp_path / "m.gguf")


def write_any(path: Path, arch: str, fields: dict[str, Any], arrays: Arrays) -> None:
    """As `write_gguf`, with numbers that need other types."""
    for key, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value < 2**32:
            fields = fields | {key: [value]}  # a list is written in the type that its numbers need
    write_gguf(path, arch, fields, arrays)


@pytest.mark.parametrize("case", ["gpt2", "neox"])
def test_fused_architectures_have_whole_heads(case: str, tmp_path: Path) -> None:
    for changes in ({"attention__head_count": 5}, {"attention__head_count_kv": 2}, {"attention__key_length": 4}):
        with pytest.raises(FlextronError):
            open_gguf(with_changes(tmp_path, case, **changes))


def test_other_files_than_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FlextronError, match="no model but is of type 'adapter'"):
        open_gguf(with_changes(tmp_path, general__type="adapter"))


def test_shapes_and_missing_tensors_are_told_by_name(tmp_path: Path) -> None:
    arch, fields, arrays, _ = parts(CASES["llama"])
    for name in ("blk.1.ffn_up.weight", "token_embd.weight", "output_norm.weight", "output.weight"):
        wrong = arrays | {name: np.zeros((8, *arrays[name].shape[1:]), np.float32)[: 8 if arrays[name].ndim > 1 else 3]}
        with pytest.raises(FlextronError, match=r"shape"):
            open_gguf(write_gguf(tmp_path / "m.gguf", arch, fields, wrong))
        if name != "output.weight":
            with pytest.raises(FlextronError, match=f"no tensor {name}"):
                open_gguf(write_gguf(tmp_path / "m.gguf", arch, fields, {n: a for n, a in arrays.items() if n != name}))


def test_more_tokens_than_the_embedding_has_rows_are_refused(tmp_path: Path) -> None:
    tokens = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [f"t{i}" for i in range(68)]}
    arch, fields, arrays, _ = parts(CASES["llama"])
    with pytest.raises(FlextronError, match="68 tokens and an embedding of only 67"):
        open_gguf(write_gguf(tmp_path / "m.gguf", arch, fields | tokens, arrays))
