"""GGUF files of sub-networks: tensors against llama.cpp's conversion rules, and what a reader computes of them.

The rules are those of `tests/gguf/writing.py`, applied to the Hugging Face directory of the same
sub-network. Files with one entry a layer are run by `llama_reference.py`; `test_llama_cpp.py` runs llama.cpp itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Olmo2Config,
    PretrainedConfig,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder
from flextron.errors import FlextronError
from flextron.export import FORMATS, export
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import CASES, our_logits, random_tokens, relative_error, stock
from tests.export.gguf.llama_reference import ReferenceModel
from tests.export.sources import PLAIN, random_source
from tests.gguf.writing import fields_of, to_gguf

GGUF, HF = FORMATS["gguf"], FORMATS["hf"]
SIZES: dict[str, Any] = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "pad_token_id": 0, "sliding_window": 5}
FULL, SLIDING = "full_attention", "sliding_attention"
LATER: dict[str, PretrainedConfig] = {
    "gemma2": Gemma2Config(**SIZES, **HEADS, **GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
    "gemma2-other": Gemma2Config(**SIZES, **HEADS, **GEMMA, layer_types=[FULL, SLIDING, SLIDING]),
    "gemma3": Gemma3TextConfig(
        **SIZES | HEADS | {"num_hidden_layers": 4},
        **GEMMA,
        layer_types=[SLIDING, FULL, FULL, SLIDING],
        rope_parameters={
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
        tie_word_embeddings=False,
    ),
    "smollm3": SmolLM3Config(
        **SIZES | HEADS | {"num_hidden_layers": 5}, no_rope_layers=[1, 0, 1, 1, 0], pad_token_id=0
    ),
    "phi3": CASES["phi3"],
    "phi3-longrope": CASES["phi3-longrope"],
    "granite": CASES["granite"],
    "olmo2": Olmo2Config(**SIZES, **HEADS, pad_token_id=0, tie_word_embeddings=True),
    "olmo2-mqa": CASES["olmo2-mqa"],
    "stablelm": CASES["stablelm"],
    "stablelm-tied": StableLmConfig(**SIZES, **HEADS, tie_word_embeddings=True, partial_rotary_factor=0.5),
}
"""Families with traits of their own, as llama.cpp has them."""
WRITTEN = {case: CASES[case] for case in PLAIN if case != "neox-sequential"} | LATER
"""All that has an architecture; the activation of `neox-sequential` has no name in GGUF."""
FILLED = {"gpt2", "neox", "olmo2", "olmo2-mqa", "stablelm", "stablelm-tied", "phi3-longrope"}
"""Those whose heads must make up the hidden size."""
NOT_WRITTEN = {
    "gpt2-rescaled": "is written without scale_by_layer",
    "llama-yarn": "is written without rope scaling of type yarn",
    "gemma2": "has no place for the biases",
    "gemma3": "scales scores by 0.25",
    "smollm3": "rotates all layers but the last of each 4",
    "olmo2": "has no place for the biases",
}
ARCHITECTURES = {"mistral": "llama", "neox": "gptneox"}
PER_LAYER = ("llama", "llama-3", "llama-linear", "llama-mqa", "qwen2", "qwen3")
TOKENS = random_tokens(1, 12)


def uniform(case: str, *, all_groups: bool) -> SubnetSpec:
    config = random_source(WRITTEN[case]).decoder.config
    groups, layers = config.num_groups if all_groups else 1, config.num_hidden_layers
    skip = 2 if case == "gemma2" else 1  # which leaves both kinds of its layers
    return SubnetSpec.uniform(num_hidden_layers=layers, intermediate_size=24, num_groups=groups, skip=[skip])


def contents(path: Path) -> tuple[dict[str, object], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_uniform_file_is_what_llama_cpps_rules_make_of_the_stock_checkpoint(case: str, tmp_path: Path) -> None:
    source = random_source(WRITTEN[case])
    spec = uniform(case, all_groups=True)
    made = export(source, tmp_path / "model.gguf", spec, format=GGUF, precision="float32")
    export(source, tmp_path / "hf", spec, format=HF)
    model = stock(tmp_path / "hf")
    expected = to_gguf(model.state_dict(), model.config)
    if model.config.tie_word_embeddings and made.architecture not in ("olmo2", "stablelm"):
        expected.pop("output.weight")
    fields, tensors = contents(tmp_path / "model.gguf")
    assert made.architecture == fields["general.architecture"] == ARCHITECTURES.get(case, case.split("-")[0])
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        rtol = 1e-6 if name == "rope_freqs.weight" else 0
        np.testing.assert_allclose(tensors[name].data, array, rtol=rtol, err_msg=name)
    for name, value in fields_of(model.config).items():
        found = fields[f"{made.architecture}.{name}"]
        if name == "context_length":
            value = {"mistral": 5, "phi3": 7, "phi3-longrope": 64}.get(case, value)
        assert found == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    if made.architecture in ("gemma2", "gemma3"):
        slides = [kind == SLIDING for kind in model.config.layer_types]
        usual = [True, False] if made.architecture == "gemma2" else None
        assert fields.get(f"{made.architecture}.attention.sliding_window_pattern", usual) == slides


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_what_is_not_written_as_gguf_is_refused(case: str, tmp_path: Path) -> None:
    source = random_source(CASES[case])
    with pytest.raises(FlextronError, match=NOT_WRITTEN[case]):
        export(source, tmp_path / "model.gguf", source.decoder.config.full_spec, format=GGUF)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("all_groups", [True, False])
@pytest.mark.parametrize("case", WRITTEN)
def test_our_reader_reads_uniform_files_back(case: str, all_groups: bool, tmp_path: Path) -> None:
    source = random_source(WRITTEN[case])
    spec = uniform(case, all_groups=all_groups)
    if case in FILLED and not all_groups:
        with pytest.raises(FlextronError, match=r"heads that make up the hidden size|rope scaling of type longrope"):
            export(source, tmp_path / "model.gguf", spec, format=GGUF)
        return
    export(source, tmp_path / "model.gguf", spec, format=GGUF, precision="float32")
    again = load_decoder(open_pretrained(tmp_path / "model.gguf"))
    # within the windows of Mistral and Phi-3; 2e-6 because the file has 32-bit floats where the config has 64
    tokens = TOKENS[:, :5] if case in ("mistral", "phi3") else TOKENS
    expected = our_logits(source.decoder, tokens, spec)
    assert relative_error(our_logits(again, tokens), expected) <= 2e-6


@st.composite
def specs(draw: st.DrawFn, case: str) -> SubnetSpec:
    """Any sub-network, with skipped halves and skipped layers, but not without layers."""
    config = CASES[case]
    groups = config.num_key_value_heads if config.num_key_value_heads > 1 else config.num_attention_heads
    layers = st.tuples(st.sampled_from([0, 8, 24, 40]), st.integers(0, groups))
    drawn = draw(st.lists(layers, min_size=3, max_size=3).filter(lambda found: any(map(any, found))))
    return SubnetSpec.of([width for width, _ in drawn], [group for _, group in drawn])


@pytest.mark.parametrize("case", PER_LAYER)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_sub_network_computes_the_same_in_its_file(
    case: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    source, path = random_source(CASES[case]), tmp_path_factory.mktemp("any") / "model.gguf"
    spec = data.draw(specs(case))
    made = export(source, path, spec, format=GGUF, precision="float32")
    expected = our_logits(source.decoder, TOKENS, spec)
    if made.architecture in ("deci", "llama", "openelm"):
        reference = ReferenceModel(path)
        found = reference.logits(TOKENS[0].tolist())[None]
        assert reference.used | {n for n in reference.tensors if n.endswith(".bias")} == reference.tensors.keys()
    else:
        assert made.widths.is_uniform
        found = our_logits(load_decoder(open_pretrained(path)), TOKENS)
    assert relative_error(found, expected) <= 2e-5


@pytest.mark.parametrize("case", ["gpt2", "neox", "qwen2", "mistral"])
def test_padding_holds_what_no_architecture_does(case: str, tmp_path: Path) -> None:
    source, spec = random_source(CASES[case]), SubnetSpec.of([8, 24, 0], [1, 0, 2])
    if case in ("gpt2", "neox"):
        with pytest.raises(FlextronError, match=r"equal widths in all layers.*--pad"):
            export(source, tmp_path / "model.gguf", spec, format=GGUF)
    made = export(source, tmp_path / "model.gguf", spec, format=GGUF, precision="float32", pad=True)
    if made.architecture == "deci":
        found = ReferenceModel(made.path).logits(TOKENS[0, :5].tolist())[None]
        assert relative_error(found, our_logits(source.decoder, TOKENS[:, :5], spec)) <= 2e-5
        return
    again = load_decoder(open_pretrained(made.path))
    assert again.widths.is_uniform
    assert relative_error(our_logits(again, TOKENS), our_logits(source.decoder, TOKENS, spec)) <= 2e-6


@pytest.mark.parametrize(
    ("case", "skip"), [("gemma2", [1]), ("gemma2", [0, 2]), ("gemma2-other", [1, 2]), ("gemma3", [1, 2])]
)
def test_gemma_needs_both_kinds_of_layers(case: str, skip: list[int], tmp_path: Path) -> None:
    source = random_source(LATER[case])
    layers = source.decoder.config.num_hidden_layers
    spec = SubnetSpec.uniform(num_hidden_layers=layers, intermediate_size=24, num_groups=2, skip=skip)
    with pytest.raises(FlextronError, match="a layer with a sliding window and one without"):
        export(source, tmp_path / "model.gguf", spec, format=GGUF)


def test_gemma_3_without_windows(tmp_path: Path) -> None:
    source = random_source(LATER["gemma3"])
    spec = SubnetSpec.uniform(num_hidden_layers=4, intermediate_size=24, num_groups=2, skip=[0, 3])
    export(source, tmp_path / "model.gguf", spec, format=GGUF, precision="float32")
    again = load_decoder(open_pretrained(tmp_path / "model.gguf"))
    assert relative_error(our_logits(again, TOKENS), our_logits(source.decoder, TOKENS, spec)) <= 2e-6


def test_a_sliding_window_becomes_the_length_of_the_context(tmp_path: Path) -> None:
    source = random_source(CASES["mistral"])
    made = export(source, tmp_path / "model.gguf", source.decoder.config.full_spec, format=GGUF, precision="float32")
    fields, _ = contents(made.path)
    assert fields["llama.context_length"] == 5
    assert "up to 5 tokens" in made.notes[0]
    again = load_decoder(open_pretrained(made.path))
    assert relative_error(our_logits(again, TOKENS[:, :5]), our_logits(source.decoder, TOKENS[:, :5])) <= 1e-6


WIDE = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=40, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "matrix", "table"),
    [
        ("float16", "F16", "F16"), ("bfloat16", "BF16", "BF16"), ("q8_0", "Q8_0", "Q8_0"), ("q4_0", "Q4_0", "Q8_0"),
    ],
)  # fmt: skip
def test_matrices_are_stored_as_asked_and_vectors_exactly(
    precision: str, matrix: str, table: str, tmp_path: Path
) -> None:
    source = random_source(WIDE)
    full = source.decoder.config.full_spec
    for name in ("float32", precision):
        export(source, tmp_path / f"{name}.gguf", full, format=GGUF, precision=name)
    _, exact = contents(tmp_path / "float32.gguf")
    fields, stored = contents(tmp_path / f"{precision}.gguf")
    assert gguf.LlamaFileType(fields["general.file_type"]).name == f"MOSTLY_{precision.upper()}".replace("FLOAT", "F")
    for name, tensor in stored.items():
        if tensor.shape.size == 1:
            wanted = "F32"
        elif name in ("token_embd.weight", "output.weight"):
            wanted = table
        else:
            # rows of 80 numbers are no whole blocks of 32
            wanted = "F16" if "attn_output" in name and "q" in precision else matrix
        assert tensor.tensor_type.name == wanted, name
        expected = gguf.quants.quantize(np.array(exact[name].data), tensor.tensor_type)
        assert np.array_equal(np.array(tensor.data).view(np.uint8), expected.view(np.uint8)), name


def test_a_place_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    source = random_source(CASES["llama"])
    full, path = source.decoder.config.full_spec, tmp_path / "model.gguf"
    path.write_text("mine")
    with pytest.raises(FlextronError, match="exists already"):
        export(source, path, full, format=GGUF)
    assert path.read_text() == "mine"
    with pytest.raises(FlextronError, match="is a directory"):
        export(source, tmp_path, full, format=GGUF, overwrite=True)
    export(source, path, full, format=GGUF, overwrite=True)
    assert load_decoder(open_pretrained(path)).config.num_hidden_layers == 3


REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "activation": (LlamaConfig(**SIZES, **HEADS, hidden_act="gelu"), "computes silu, the model gelu"),
    "head": (Qwen3Config(**SIZES, **HEADS, head_dim=12, tie_word_embeddings=False), "no head apart"),
    "biases": (Qwen3Config(**SIZES, **HEADS, head_dim=12, tie_word_embeddings=True, attention_bias=True), "biases of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused(case: str, tmp_path: Path) -> None:
    config, reason = REFUSED[case]
    with pytest.raises(FlextronError, match=reason):
        export(random_source(config), tmp_path / "model.gguf", SubnetSpec.of([8, 24, 0], [1, 0, 2]), format=GGUF)
    assert list(tmp_path.iterdir()) == []


def test_the_sub_network_itself_is_not_touched(tmp_path: Path) -> None:
    source = random_source(CASES["llama"])
    before = {name: parameter.clone() for name, parameter in source.decoder.named_parameters()}
    export(source, tmp_path / "model.gguf", source.decoder.config.full_spec, format=GGUF, precision="q8_0")
    assert all(torch.equal(parameter, before[name]) for name, parameter in source.decoder.named_parameters())
