"""Each family against `transformers`: logits, gradients of all parameters, greedy tokens, the checkpoint written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder, write_checkpoint
from flextron.errors import FlextronError, UnsupportedModelError
from flextron.families.config import FAMILIES, config_from_hf
from flextron.generation.generate import SamplingParams, generate
from tests.checkpoints.families_cases import (
    CASES,
    GPT2,
    HEADS,
    LLAMA3,
    NEOX,
    SIZES,
    decoder_of,
    hf_config_of,
    hf_greedy,
    hf_logits,
    in_float64,
    our_logits,
    random_from,
    random_model,
    random_tokens,
    relative_error,
    stock,
)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str) -> None:
    model, tokens = random_model(case), random_tokens(3, 24)
    assert relative_error(our_logits(decoder_of(model), tokens), hf_logits(model, tokens)) <= 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_equal_those_of_transformers(case: str, gradient_checkpointing: bool) -> None:
    model, tokens = in_float64(random_model(case)), random_tokens(2, 12)
    decoder = decoder_of(model)
    decoder.gradient_checkpointing = gradient_checkpointing
    targets = random_tokens(24, seed=2)
    F.cross_entropy(model(tokens, use_cache=False).logits.flatten(0, 1), targets).backward()
    F.cross_entropy(our_logits(decoder, tokens).flatten(0, 1), targets).backward()

    ours = {name: p.grad for name, p in decoder.named_parameters()}
    # transformers renamed NeoX's head in memory, but not in what it saves
    head = "embed_out.weight" if decoder.config.family == "gpt_neox" else "lm_head.weight"
    reference = {head if name == "lm_head.weight" else name: p for name, p in model.named_parameters()}
    compared: set[str] = set()
    for m in FAMILIES[decoder.config.family].tensors:
        for i in range(decoder.config.num_hidden_layers if "{i}" in m.hf else 1):
            name = m.hf.format(i=i)
            if name not in reference:
                continue
            grads = [ours[p.format(i=i)] for p in m.ours]
            assert all(g is not None for g in grads), name
            joined = m.join([g for g in grads if g is not None], decoder.config.head_dim)
            expected = reference[name].grad
            assert expected is not None
            assert relative_error(joined, expected) <= 1e-10, name
            compared.update([name, *(p.format(i=i) for p in m.ours)])
    assert compared == set(ours) | set(reference)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_those_of_transformers(case: str) -> None:
    # random models of these families say more with other weights
    model = random_model(case, seed={"gemma3": 4, "smollm3": 4, "olmo2": 2}.get(case, 3))
    prompt = random_tokens(9).tolist()
    decoder = decoder_of(model)
    expected = hf_greedy(model, prompt, 32)
    assert len(set(expected)) > 3  # a text that only repeats itself would prove little
    assert generate(decoder, [prompt], decoder.widths, SamplingParams(max_tokens=32)) == [expected]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shard_bytes", [1, 20_000, 10**9])
def test_written_checkpoint_loads_in_stock_transformers(case: str, shard_bytes: int, tmp_path: Path) -> None:
    model, tokens = random_model(case), random_tokens(2, 16)
    decoder = decoder_of(model)
    write_checkpoint(decoder, tmp_path, hf_config=hf_config_of(model), tokenizer=None, shard_bytes=shard_bytes)
    num_files = len(list(tmp_path.glob("*.safetensors")))
    assert num_files == 1 if shard_bytes == 10**9 else num_files > 1
    assert not list(tmp_path.glob("part-*"))
    back = stock(tmp_path)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(hf_logits(back, tokens), hf_logits(model, tokens))


OLDER_ROPE_KEYS = {
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "rotary_emb_base",
    "rotary_pct",
    "rope_local_base_freq",
}


@pytest.mark.parametrize("case", CASES)
def test_written_checkpoint_keeps_config_and_weights(case: str, tmp_path: Path) -> None:
    model = random_model(case)
    decoder = decoder_of(model)
    write_checkpoint(decoder, tmp_path, hf_config=hf_config_of(model), tokenizer=None)
    pretrained = open_pretrained(tmp_path)
    given, written = hf_config_of(model), dict(pretrained.hf_config)
    # rotary settings have their names of before transformers 5, too; dtype and architectures are filled in
    for key in OLDER_ROPE_KEYS - given.keys():
        written.pop(key, None)
    filled = {"dtype": None, "architectures": None}
    assert written | filled == given | filled | {"tie_word_embeddings": decoder.config.tie_word_embeddings}
    back = load_decoder(pretrained)
    assert back.config == decoder.config
    theirs = dict(decoder.named_parameters())
    assert dict(back.named_parameters()).keys() == theirs.keys()
    assert all(torch.equal(p, theirs[name]) for name, p in back.named_parameters())


@pytest.mark.parametrize("case", ["llama-3", "llama-linear", "neox"])
def test_rope_settings_of_older_configs_mean_the_same(case: str) -> None:
    new = hf_config_of(random_model(case))
    old = dict(new)
    rope = dict(old.pop("rope_parameters"))
    if case == "neox":
        old |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    else:
        old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    ours, theirs = config_from_hf(old).rope, config_from_hf(new).rope
    assert ours is not None
    assert theirs is not None
    assert (ours.theta, ours.fraction) == (theirs.theta, theirs.fraction)
    assert (ours.scaling or {}).get("factor") == (theirs.scaling or {}).get("factor")
    assert (ours.scaling is None) == (case == "neox")


def test_a_fully_windowed_qwen2_has_one_window() -> None:
    windowed = Qwen2Config(**SIZES, **HEADS, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    model, tokens = random_from(windowed), random_tokens(1, 16)
    decoder = decoder_of(model)
    assert decoder.config.sliding_window == 4
    assert relative_error(our_logits(decoder, tokens), hf_logits(model, tokens)) <= 1e-5


def test_untied_gpt2_and_neox_without_attention_biases_run() -> None:
    untied = GPT2Config(**GPT2, n_layer=2, tie_word_embeddings=False)
    plain = GPTNeoXConfig(**SIZES, **NEOX, attention_bias=False)
    tokens = random_tokens(1, 16)
    for config in (untied, plain):
        model = random_from(config)
        assert relative_error(our_logits(decoder_of(model), tokens), hf_logits(model, tokens)) <= 1e-5


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu"])
def test_activations_equal_those_of_transformers(activation: str) -> None:
    config = GPT2Config(**GPT2, n_layer=1, activation_function=activation)
    model, tokens = random_from(config), random_tokens(1, 16)
    assert relative_error(our_logits(decoder_of(model), tokens), hf_logits(model, tokens)) <= 1e-5


def test_unknown_rope_scaling_and_activation_are_refused() -> None:
    other = LLAMA3 | {"rope_type": "proportional"}
    with pytest.raises(
        UnsupportedModelError, match=r"'proportional'.*default, linear, llama3, dynamic, yarn, longrope"
    ):
        config_from_hf(hf_config_of(random_model("llama")) | {"rope_parameters": other})
    with pytest.raises(UnsupportedModelError, match=r"'tanh'.*silu"):
        decoder_of(random_from(LlamaConfig(**SIZES, **HEADS, hidden_act="tanh")))


def test_malformed_config_is_a_flextron_error() -> None:
    with pytest.raises(FlextronError, match=r"config.json of a llama model is malformed \(hidden_size"):
        config_from_hf({"model_type": "llama", "hidden_size": "wide"})


@pytest.mark.parametrize("option", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_gpt2_variants_run_right_or_are_refused(option: dict[str, Any]) -> None:
    model, tokens = random_from(GPT2Config(**GPT2, n_layer=3, **option)), random_tokens(1, 16)
    try:
        decoder = decoder_of(model)
    except UnsupportedModelError:
        return
    assert relative_error(our_logits(decoder, tokens), hf_logits(model, tokens)) <= 1e-5


def test_the_table_of_families_has_them_all() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "families.md"
    named = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in page.read_text().splitlines() if "|" in line]
    assert set().union(*named) - {"model_type"} == set(FAMILIES) | {"gemma3"}
