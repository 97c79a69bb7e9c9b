"""Stock Hugging Face directories of sub-networks: what transformers computes with them, and what stands beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, GenerationConfig

from flextron.errors import FlextronError
from flextron.export import FORMATS, export
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import CASES, hf_logits, our_logits, random_tokens, relative_error, stock
from tests.export.sources import measured, random_source
from tests.tokenizers_zoo import zoo_tokenizer

HF = FORMATS["hf"]
NARROW_MLP, NARROW = SubnetSpec.of([24, 0, 24], [2, 0, 2]), SubnetSpec.of([24, 0, 24], [1, 0, 1])
MIXED = SubnetSpec.of([8, 24, 0], [1, 0, 2])
FEW_HEADS = ("llama", "llama-3", "llama-linear", "mistral", "qwen2", "qwen3")


def kept(spec: SubnetSpec, groups: int) -> SubnetSpec:
    """The spec with that many groups wherever it has any."""
    return SubnetSpec.of(spec.intermediate_sizes, [groups if g else 0 for g in spec.num_groups])


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_sub_network(case: str, tmp_path: Path) -> None:
    source, tokens = random_source(CASES[case]), random_tokens(2, 12)
    whole = kept(NARROW_MLP, source.decoder.config.num_groups)
    for i, spec in enumerate([whole, NARROW] if case in FEW_HEADS else [whole]):
        made = export(source, tmp_path / str(i), spec, format=HF)
        model = stock(tmp_path / str(i))
        assert made.architecture == type(model).__name__
        assert made.num_parameters == model.num_parameters()
        assert relative_error(our_logits(source.decoder, tokens, spec), hf_logits(model, tokens)) <= 2e-5


@pytest.mark.parametrize("case", CASES)
def test_padding_with_zeros_changes_nothing(case: str, tmp_path: Path) -> None:
    source, tokens = random_source(CASES[case]), random_tokens(2, 12)
    made = export(source, tmp_path / "padded", MIXED, format=HF, pad=True)
    assert made.widths.is_uniform
    assert MIXED.is_nested_in(made.widths)
    assert "zeros" in made.notes[0]
    model = stock(tmp_path / "padded")
    assert relative_error(our_logits(source.decoder, tokens, MIXED), hf_logits(model, tokens)) <= 2e-5


def test_a_sub_network_that_no_config_says_is_refused_with_the_nearest(tmp_path: Path) -> None:
    source = random_source(CASES["llama"])
    source.frontier = measured(source, NARROW, NARROW_MLP, MIXED)
    with pytest.raises(FlextronError, match=r"equal widths.*--pad.*gguf holds it.*nearest measured") as caught:
        export(source, tmp_path / "out", MIXED, format=HF)
    assert NARROW.describe() in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_weights_are_written_in_the_precision_asked_for(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = random_source(CASES["llama"])
    made = export(source, tmp_path / "out", NARROW, format=HF, precision=precision)
    assert stock(tmp_path / "out").dtype == dtype
    assert made.num_bytes < 2 * made.num_parameters + 30_000
    assert source.decoder.dtype == torch.float32
    with pytest.raises(FlextronError, match="float32, bfloat16, float16"):
        export(source, tmp_path / "other", NARROW, format=HF, precision="q8_0")


def test_the_card_tells_what_it_is_and_what_was_measured(tmp_path: Path) -> None:
    source = random_source(CASES["llama"])
    source.frontier = measured(source, NARROW, NARROW_MLP)
    export(source, tmp_path / "out", NARROW, format=HF)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "owner/model"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "flextron" in card.data.tags
    assert source.frontier.device in card.text
    for point in source.frontier.points:
        assert f"{point.params:,}" in card.text
        assert f"{point.loss:.4f}" in card.text
    assert card.text.count("this one") == 1
    for i, layer in enumerate(NARROW.layers):
        assert f"| {i} | {layer.intermediate_size} | {layer.num_groups} |" in card.text


def test_a_path_of_the_maker_is_no_base_model(tmp_path: Path) -> None:
    source = random_source(CASES["llama"])
    source.info.provenance["source"] = str(tmp_path / "secret" / "base")
    export(source, tmp_path / "out", NARROW, format=HF)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None
    assert "secret" not in card.text
    assert "# A sub-network of base" in card.text


def test_generation_settings_and_tokenizer_go_along(tmp_path: Path) -> None:
    tokenizer = zoo_tokenizer("llama-3")
    config = type(CASES["llama"])(**CASES["llama"].to_dict() | {"vocab_size": len(tokenizer)})
    source = random_source(config, tokenizer)
    source.generation_config = {"eos_token_id": [1, 5], "temperature": 0.7, "do_sample": True}
    export(source, tmp_path / "out", NARROW, format=HF)
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.temperature, settings.do_sample) == ([1, 5], 0.7, True)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("Once upon")["input_ids"] == tokenizer("Once upon")["input_ids"]
    source.generation_config = None
    export(source, tmp_path / "out", NARROW, format=HF, overwrite=True)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in written["eos_token_id"]
