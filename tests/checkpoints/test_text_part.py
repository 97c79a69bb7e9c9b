"""The text part of a Gemma 3 that sees: against `transformers`, by both generations of tensor names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel, SiglipVisionConfig

from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder, write_checkpoint
from flextron.errors import FlextronError
from tests.checkpoints.families_cases import CASES, hf_logits, our_logits, random_tokens, relative_error, stock

EYES = SiglipVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)


@pytest.fixture(scope="module")
def seeing() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=CASES["gemma3"].to_dict(), vision_config=EYES.to_dict(), mm_tokens_per_image=4, image_token_index=66
    )
    config._attn_implementation = "eager"
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("renamed", [False, True])
def test_text_of_a_model_that_sees(seeing: PreTrainedModel, renamed: bool, tmp_path: Path) -> None:
    seeing.save_pretrained(tmp_path / "in")
    if renamed:  # transformers since 5 in memory; files have had either form
        path, names = tmp_path / "in" / "model.safetensors", {}
        for name, tensor in load_file(path).items():
            old = name.replace("language_model.model.", "model.language_model.", 1)
            names[old if old != name else name] = tensor
        save_file(names, path, metadata={"format": "pt"})
    tokens = random_tokens(2, 12) % 66  # 66 stands for an image
    pretrained = open_pretrained(tmp_path / "in")
    decoder = load_decoder(pretrained)
    assert decoder.config.family == "gemma3_text"
    reference = hf_logits(seeing, tokens)
    with torch.no_grad():
        assert relative_error(our_logits(decoder, tokens), reference) <= 1e-5
    (tmp_path / "out").mkdir()
    write_checkpoint(decoder, tmp_path / "out", hf_config=pretrained.hf_config, tokenizer=None)
    back = stock(tmp_path / "out")
    assert type(back).__name__ == "Gemma3ForCausalLM"
    assert relative_error(hf_logits(back, tokens), reference) <= 1e-6


def test_a_config_without_a_text_part_is_refused(seeing: PreTrainedModel, tmp_path: Path) -> None:
    seeing.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": None}))
    with pytest.raises(FlextronError, match="has no text_config"):
        open_pretrained(tmp_path)
