"""A sub-network in five forms is one function: masked, sliced, extracted, exported to stock `transformers`, read back.

The reference is masked: the output projections' inputs beyond the prefix are zeroed, so that what lies beyond adds
nothing, and a skipped half loses its output bias too.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder, write_checkpoint
from flextron.elastic import extract
from flextron.errors import FlextronError
from flextron.model.config import DecoderConfig
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import (
    CASES,
    decoder_of,
    hf_config_of,
    hf_logits,
    in_float64,
    our_logits,
    random_decoder_of,
    random_model,
    random_tokens,
    relative_error,
    stock,
)

TOKENS = random_tokens(2, 12)
OUTPUTS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


def output_projections(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """The projections out of attention and MLP, layer by layer."""
    names = OUTPUTS.get(model.config.model_type, OUTPUTS["llama"])
    base: Any = model.base_model
    layers = base.h if model.config.model_type == "gpt2" else base.layers
    return [(layer.get_submodule(names[0]), layer.get_submodule(names[1])) for layer in layers]


def zero_beyond(module: nn.Module, width: int) -> None:
    """Zero the weights of all inputs from `width` on; at width 0 the bias as well."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    by_input = weight.t() if isinstance(module, nn.Linear) else weight  # GPT-2 stores (in, out)
    by_input[width:] = 0
    if width == 0 and isinstance(bias, Tensor):
        bias.zero_()


class _NormOfLeading(nn.Module):
    """The RMS norm of the leading numbers alone, for families that normalise all heads as one vector."""

    def __init__(self, norm: Any, size: int) -> None:
        super().__init__()
        self.weight, self.eps, self.size = norm.weight, norm.variance_epsilon, size

    def forward(self, x: Tensor) -> Tensor:
        own = x[..., : self.size]
        own = own * torch.rsqrt(own.square().mean(-1, keepdim=True) + self.eps) * self.weight[: self.size]
        return nn.functional.pad(own, (0, x.shape[-1] - self.size))


@torch.no_grad()
def masked(model: PreTrainedModel, config: DecoderConfig, spec: SubnetSpec) -> PreTrainedModel:
    """A copy whose neurons and heads beyond the prefix add nothing."""
    out = copy.deepcopy(model)
    heads_per_group = config.num_attention_heads // config.num_groups
    for (attention, mlp), layer in zip(output_projections(out), spec.layers, strict=True):
        zero_beyond(attention, layer.num_groups * heads_per_group * config.head_dim)
        zero_beyond(mlp, layer.intermediate_size)
    if config.qk_norm == "width":
        base: Any = out.base_model
        for attention, layer in zip((block.self_attn for block in base.layers), spec.layers, strict=True):
            rows = layer.num_groups * heads_per_group * config.head_dim
            attention.q_norm = _NormOfLeading(attention.q_norm, rows)
            attention.k_norm = _NormOfLeading(attention.k_norm, config.kv_rows(layer.num_groups))
    return out


def check_equal(case: str, spec: SubnetSpec) -> Tensor:
    """Masked, sliced and extracted give the same logits, which are returned.

    They do so in float64: a norm behind a half of one neuron makes much of rounding.
    """
    decoder = random_decoder_of(case).double()
    reference = hf_logits(in_float64(masked(random_model(case), decoder.config, spec)), TOKENS)
    with torch.no_grad():
        assert relative_error(our_logits(decoder, TOKENS, spec), reference) <= 1e-10
        assert relative_error(our_logits(extract(decoder, spec), TOKENS), reference) <= 1e-10
    return reference


# (MLP width, groups, skipped layers); None keeps all groups, as GPT-2 and GPT-NeoX checkpoints must
UNIFORM = [
    ("llama", 16, 1, ()),
    ("llama", 40, 1, (1,)),
    ("llama-3", 24, 1, (0,)),
    ("llama-mqa", 16, 2, (2,)),
    ("llama-mqa", 16, 1, ()),
    ("mistral", 8, 1, (1,)),
    ("qwen2", 8, 1, ()),
    ("qwen3", 24, 1, (0, 2)),
    ("gpt2", 16, None, ()),
    ("gpt2", 8, None, (1,)),
    ("neox", 16, None, (0,)),
    ("neox-sequential", 24, None, (2,)),
    ("gpt2-rescaled", 16, None, (2,)),
    ("llama-yarn", 16, 1, (0,)),
    ("qwen2-mixed", 16, 1, (0,)),
    ("gemma2", 24, 1, (0,)),
    ("gemma3", 16, 1, (1,)),
    ("smollm3", 24, 1, (0,)),
    ("phi3", 16, 1, (2,)),
    ("phi3-longrope", 16, None, (1,)),
    ("granite", 24, 1, (1,)),
    ("olmo2", 16, 1, (0,)),
    ("olmo2-mqa", 16, 2, ()),
    ("stablelm", 24, None, (1,)),
]


@pytest.mark.parametrize(("case", "intermediate_size", "num_groups", "skip"), UNIFORM)
def test_uniform_masked_sliced_extracted_exported_and_reloaded_agree(
    case: str, intermediate_size: int, num_groups: int | None, skip: tuple[int, ...], tmp_path: Path
) -> None:
    model = random_model(case)
    decoder = decoder_of(model)
    spec = SubnetSpec.uniform(
        num_hidden_layers=3,
        intermediate_size=intermediate_size,
        num_groups=num_groups or decoder.config.num_groups,
        skip=skip,
    )
    reference = check_equal(case, spec)
    # the narrow network is not the full one, so an export that ignored the spec would show
    assert relative_error(hf_logits(model, TOKENS), reference) > 1e-2

    write_checkpoint(extract(decoder, spec), tmp_path, hf_config=hf_config_of(model), tokenizer=None)
    exported = stock(tmp_path)
    assert exported.config.num_hidden_layers == 3 - len(skip)
    assert relative_error(hf_logits(exported, TOKENS), reference) <= 1e-5
    with torch.no_grad():
        again = load_decoder(open_pretrained(tmp_path))
        assert relative_error(our_logits(again, TOKENS), reference) <= 1e-5


def test_a_head_count_that_does_not_divide_the_hidden_size_is_refused_or_loads(tmp_path: Path) -> None:
    model = random_model("llama-mqa")
    spec = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=16, num_groups=3)
    narrow = extract(decoder_of(model), spec)
    try:
        write_checkpoint(narrow, tmp_path, hf_config=hf_config_of(model), tokenizer=None)
    except FlextronError:
        return
    with torch.no_grad():
        assert relative_error(hf_logits(stock(tmp_path), TOKENS), our_logits(narrow, TOKENS)) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_skipped_halves_and_layers_agree(case: str) -> None:
    check_equal(case, SubnetSpec.of([40, 0, 8], [0, 2, 1]))
    check_equal(case, SubnetSpec.of([0, 16, 0], [0, 1, 2]))
    check_equal(case, SubnetSpec.of([0, 0, 0], [0, 0, 0]))


@pytest.mark.parametrize("case", ["llama", "llama-mqa", "qwen3", "gpt2", "neox", "gemma2", "olmo2"])
@given(data=st.data())
@settings(max_examples=8)
def test_any_widths_agree(case: str, data: st.DataObject) -> None:
    groups = 4 if case in ("llama-mqa", "gpt2", "neox") else 2
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=3, max_size=3))
    check_equal(case, SubnetSpec.of(sizes, data.draw(st.lists(st.integers(0, groups), min_size=3, max_size=3))))


@pytest.mark.parametrize("case", ["llama", "gpt2", "neox"])
def test_unequal_widths_are_no_stock_checkpoint(case: str, tmp_path: Path) -> None:
    model = random_model(case)
    for spec in (SubnetSpec.of([40, 8, 8], [2, 2, 2]), SubnetSpec.of([8, 8, 8], [2, 0, 2])):
        with pytest.raises(FlextronError, match="equal widths in all its layers"):
            write_checkpoint(extract(decoder_of(model), spec), tmp_path, hf_config=hf_config_of(model), tokenizer=None)


@pytest.mark.parametrize("case", ["gpt2", "neox"])
def test_fewer_heads_are_no_stock_checkpoint_of_gpt_families(case: str, tmp_path: Path) -> None:
    model = random_model(case)
    narrow = extract(decoder_of(model), SubnetSpec.of([8, 8, 8], [3, 3, 3]))
    with pytest.raises(FlextronError, match="keep all 4 groups"):
        write_checkpoint(narrow, tmp_path, hf_config=hf_config_of(model), tokenizer=None)
