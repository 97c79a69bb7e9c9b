"""Nemotron-NAS directories: what vLLM's model computes with them, and what does not fit."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig

from flextron.errors import FlextronError
from flextron.export import FORMATS, export
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import CASES, our_logits, random_tokens, relative_error
from tests.export.decilm_reference import Reference
from tests.export.sources import random_source

NAS = FORMATS["nemotron-nas"]
FITTING = ("llama", "llama-3", "llama-linear", "llama-mqa", "qwen2")
TOKENS = random_tokens(1, 12)


@pytest.mark.parametrize("case", FITTING)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_what_fits_computes_the_same(case: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    source, path = random_source(CASES[case]), tmp_path_factory.mktemp("nas") / "model"
    groups = data.draw(st.integers(1, source.decoder.config.num_groups))
    halves = st.tuples(st.sampled_from([0, 8, 24, 40]), st.sampled_from([0, groups]))
    drawn = data.draw(st.lists(halves, min_size=3, max_size=3).filter(lambda found: any(map(any, found))))
    spec = SubnetSpec.of([width for width, _ in drawn], [group for _, group in drawn])
    made = export(source, path, spec, format=NAS, precision="float32")
    assert made.architecture == "DeciLMForCausalLM"
    reference = Reference(path)
    found = reference.logits(TOKENS[0])[None]
    assert relative_error(found, our_logits(source.decoder, TOKENS, spec)) <= 2e-5
    assert reference.used == reference.weights.keys()


@pytest.mark.parametrize("case", FITTING)
def test_padding_widens_the_attention_alone(case: str, tmp_path: Path) -> None:
    source, spec = random_source(CASES[case]), SubnetSpec.of([8, 24, 0], [1, 0, 2])
    with pytest.raises(FlextronError, match=r"from 1 to 2 groups.*--pad"):
        export(source, tmp_path / "model", spec, format=NAS)
    made = export(source, tmp_path / "model", spec, format=NAS, precision="float32", pad=True)
    assert made.widths == SubnetSpec.of([8, 24, 0], [2, 0, 2])
    found = Reference(tmp_path / "model").logits(TOKENS[0])[None]
    assert relative_error(found, our_logits(source.decoder, TOKENS, spec)) <= 2e-5


def test_widths_in_multiples_of_256_are_written_for_those_who_know_no_others(tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 768, "num_hidden_layers": 3, "vocab_size": 67}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    source = random_source(LlamaConfig(**sizes, **heads))
    for i, (widths, has_mult) in enumerate((([256, 768, 512], True), ([256, 700, 512], False))):
        spec = SubnetSpec.of(widths, [2, 2, 0])
        export(source, tmp_path / str(i), spec, format=NAS, precision="float32")
        reference = Reference(tmp_path / str(i))
        assert all(hasattr(block.ffn, "ffn_mult") == has_mult for block in reference.config.block_configs)
        found = reference.logits(TOKENS[0])[None]
        assert relative_error(found, our_logits(source.decoder, TOKENS, spec)) <= 2e-5


@pytest.mark.parametrize(
    ("case", "reason"), [("qwen3", "not qwen3"), ("gpt2", "not gpt2"), ("mistral", "sliding window of 5")]
)
def test_other_families_are_refused(case: str, reason: str, tmp_path: Path) -> None:
    source = random_source(CASES[case])
    for pad in (False, True):
        with pytest.raises(FlextronError, match=reason):
            export(source, tmp_path / "model", source.decoder.config.full_spec, format=NAS, pad=pad)


def test_the_config_is_copied_pickled_and_written_as_any_other(tmp_path: Path) -> None:
    source = random_source(CASES["llama"])
    export(source, tmp_path / "model", SubnetSpec.of([8, 24, 0], [2, 0, 2]), format=NAS)
    config = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert config.block_configs[1].attention.no_op
    assert not hasattr(config.block_configs[1].ffn, "ffn_mult")
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again.block_configs[1].ffn.intermediate_size == 24
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["block_configs"] == json.loads((tmp_path / "model" / "config.json").read_text())["block_configs"]
