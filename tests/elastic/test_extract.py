"""Extracted sub-networks: copies of prefixes, which share no memory and nest in each other."""

from __future__ import annotations

import pytest
import torch

from flextron.elastic import extract
from flextron.errors import FlextronError
from flextron.model.cost import num_parameters
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import MECHANISMS, our_logits, random_decoder_of, random_tokens

WIDE = SubnetSpec.of([40, 24, 16], [2, 2, 1])
NARROW = SubnetSpec.of([8, 24, 0], [1, 0, 1])
TOKENS = random_tokens(1, 10)


@pytest.mark.parametrize("case", MECHANISMS)
def test_narrower_weights_are_prefixes_of_wider_ones(case: str) -> None:
    decoder = random_decoder_of(case)
    wide, narrow = extract(decoder, WIDE), extract(decoder, NARROW)
    full, wider = dict(decoder.named_parameters()), dict(wide.named_parameters())
    smaller = 0
    for name, parameter in narrow.named_parameters():
        prefix = tuple(slice(n) for n in parameter.shape)
        assert torch.equal(parameter, wider[name][prefix])
        assert torch.equal(parameter, full[name][prefix])
        smaller += parameter.numel() < full[name].numel()
    assert smaller >= 5
    assert sum(p.numel() for p in narrow.parameters()) == num_parameters(decoder.config, NARROW)


@pytest.mark.parametrize("case", ["llama", "llama-3", "llama-mqa", "gpt2", "neox"])
def test_shapes_follow_the_widths(case: str) -> None:
    decoder = random_decoder_of(case)
    shapes = {name: tuple(p.shape) for name, p in extract(decoder, NARROW).named_parameters()}
    heads, kv_heads, head_dim = {
        "llama": (2, 1, 8),
        "llama-3": (2, 1, 12),
        "llama-mqa": (1, 1, 8),
        "gpt2": (1, 1, 8),
        "neox": (1, 1, 8),
    }[case]
    assert shapes["layers.0.mlp.up.weight"] == (8, 32)
    assert shapes["layers.0.mlp.down.weight"] == (8, 32)
    assert shapes["layers.0.attention.q.weight"] == (heads * head_dim, 32)
    assert shapes["layers.0.attention.k.weight"] == (kv_heads * head_dim, 32)
    assert shapes["layers.0.attention.o.weight"] == (heads * head_dim, 32)
    assert not any(name.startswith(("layers.1.attention", "layers.2.mlp")) for name in shapes)
    assert shapes["embedding.weight"] == (67, 32)


@pytest.mark.parametrize("spec", [WIDE, NARROW, SubnetSpec.of([40] * 3, [2] * 3)])
def test_no_memory_is_shared(spec: SubnetSpec) -> None:
    decoder = random_decoder_of("llama")
    small = extract(decoder, spec)
    expected = our_logits(decoder, TOKENS, spec).detach()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        torch.testing.assert_close(our_logits(small, TOKENS), expected)
        for parameter in small.parameters():
            parameter.fill_(1)
    assert not any(p.any() for p in decoder.parameters())


def test_extracting_in_two_steps_is_extracting_once() -> None:
    decoder = random_decoder_of("qwen3")
    twice, once = extract(extract(decoder, WIDE), NARROW), extract(decoder, NARROW)
    assert twice.widths == once.widths == NARROW
    theirs = dict(once.named_parameters())
    assert dict(twice.named_parameters()).keys() == theirs.keys()
    assert all(torch.equal(p, theirs[name]) for name, p in twice.named_parameters())


@pytest.mark.parametrize(
    "spec",
    [
        SubnetSpec.of([41, 8, 8], [1, 1, 1]),
        SubnetSpec.of([8, 8, 8], [1, 3, 1]),
        SubnetSpec.of([8, 8], [1, 1]),
        SubnetSpec.of([8] * 4, [1] * 4),
    ],
)
def test_what_is_not_nested_is_refused(spec: SubnetSpec) -> None:
    with pytest.raises(FlextronError, match="is not nested in the model"):
        extract(random_decoder_of("llama"), spec)


def test_what_an_extracted_model_lacks_is_refused() -> None:
    narrow = extract(random_decoder_of("llama"), NARROW)
    with pytest.raises(FlextronError, match="is not nested"):
        extract(narrow, WIDE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_of_the_weights_is_kept(dtype: torch.dtype) -> None:
    assert extract(random_decoder_of("llama").to(dtype), NARROW).dtype == dtype
