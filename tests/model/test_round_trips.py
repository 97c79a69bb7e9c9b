"""Families x {tied, untied} x {float32, bfloat16, float16}, in one file or shards: in, out, back in `transformers`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder, write_checkpoint
from tests.checkpoints.families_cases import (
    CASES,
    hf_logits,
    our_logits,
    random_from,
    random_tokens,
    relative_error,
    stock,
)

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "neox", "gemma2", "gemma3", "phi3", "olmo2", "stablelm"]
_BYTES = {"1GB": None, "20KB": 20_000}
HEADS = {"gpt2": "lm_head.weight", "neox": "embed_out.weight"}
EMBEDDINGS = {"gpt2": "transformer.wte.weight", "neox": "gpt_neox.embed_in.weight"}


def model_of(family: str, *, tied: bool) -> PreTrainedModel:
    config = copy.deepcopy(CASES[family])
    config.tie_word_embeddings = tied
    return random_from(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "shard"), [(torch.float32, "20KB"), (torch.bfloat16, "1GB"), (torch.float16, "20KB")], ids=str
)
def test_round_trip(family: str, tied: bool, dtype: torch.dtype, shard: str, tmp_path: Path) -> None:
    model = model_of(family, tied=tied).to(dtype)
    model.save_pretrained(tmp_path / "in", max_shard_size=shard)
    assert (len(list((tmp_path / "in").glob("*.safetensors"))) > 1) == (shard == "20KB")
    tokens = random_tokens(1, 16)
    pretrained = open_pretrained(tmp_path / "in")
    decoder = load_decoder(pretrained)
    assert decoder.config.tie_word_embeddings == tied
    # the same numbers, computed in float32 from the rotation's frequencies on
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "in", attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert relative_error(our_logits(decoder, tokens).detach(), hf_logits(reference, tokens)) <= 1e-5
    (tmp_path / "out").mkdir()
    write_checkpoint(
        decoder,
        tmp_path / "out",
        hf_config=pretrained.hf_config,
        tokenizer=None,
        shard_bytes=_BYTES[shard],
    )
    back = stock(tmp_path / "out")
    assert torch.equal(hf_logits(back, tokens), hf_logits(reference, tokens))
    assert (back.get_input_embeddings().weight is back.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", ["only the embedding", "only the head", "both, equal", "both, different"])
def test_the_file_decides_what_is_tied(family: str, stored: str, tmp_path: Path) -> None:
    head, embedding = HEADS.get(family, "lm_head.weight"), EMBEDDINGS.get(family, "model.embed_tokens.weight")
    model_of(family, tied=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert head not in tensors
    if stored != "only the embedding":
        tensors[head] = tensors[embedding].clone()
    if stored == "only the head":
        del tensors[embedding]
    if stored == "both, different":
        tensors[head] += 0.5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = random_tokens(1, 16)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    pretrained = open_pretrained(tmp_path)
    decoder = load_decoder(pretrained)
    assert decoder.config.tie_word_embeddings == (stored != "both, different")
    assert relative_error(our_logits(decoder, tokens).detach(), hf_logits(reference, tokens)) <= 1e-5
    (tmp_path / "out").mkdir()
    write_checkpoint(decoder, tmp_path / "out", hf_config=pretrained.hf_config, tokenizer=None)
    assert torch.equal(hf_logits(stock(tmp_path / "out"), tokens), hf_logits(reference, tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_neox_takes_either_name_of_its_head(tied: bool, tmp_path: Path) -> None:
    model = model_of("neox", tied=tied)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight", tensors["gpt_neox.embed_in.weight"]).clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = random_tokens(1, 16)
    ours = our_logits(load_decoder(open_pretrained(tmp_path)), tokens).detach()
    assert relative_error(ours, hf_logits(model, tokens)) <= 1e-5
    assert relative_error(ours, hf_logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tokens)) <= 1e-5
