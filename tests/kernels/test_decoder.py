"""The compiled iteration against the decoder's own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from flextron.errors import FlextronError
from flextron.families.config import config_from_hf
from flextron.kernels.adapters import NativeAdapter, why_adapter_not_native
from flextron.kernels.build import load_library
from flextron.kernels.decoder import NativeStep, Weights, why_not_native
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder, capped
from flextron.spec import LayerSpec, SubnetSpec
from tests.checkpoints.families_cases import CASES, HEADS, SIZES
from tests.model.adapter_cases import random_ia3, random_lora
from tests.random_decoders import (
    ragged_specs,
    random_decoder,
    rounded,
    rounded_decoder,
    rounded_tokens,
    whole_number_products,
)

PAGE = 4
LENGTHS = (7, 1, 13, 9)
# (sequence, first token, end) of every iteration: prompts in chunks beside single tokens
ITERATIONS = (
    ((0, 0, 3), (1, 0, 1), (2, 0, 5)),
    ((2, 5, 12), (3, 0, 4), (0, 3, 4)),
    ((3, 4, 9), (0, 4, 7), (2, 12, 13)),
)

compiled = pytest.mark.skipif(isinstance(load_library("decoder"), str), reason=f"no kernels: {load_library('decoder')}")


class Pages:
    """Page tables in random order over a cache that holds NaN where nothing was written."""

    def __init__(self, decoder: Decoder, specs: list[SubnetSpec]) -> None:
        """Reserve pages for all sequences."""
        config = decoder.config
        self.tables: list[Tensor] = []
        self.offsets: list[list[int]] = []
        num_blocks = 0
        for spec, length in zip(specs, LENGTHS, strict=True):
            heads = [config.kv_rows(layer.num_groups) // config.head_dim for layer in spec.layers]
            self.offsets.append([sum(heads[:i]) for i in range(len(heads))])
            shape = (-(-length // PAGE), max(1, sum(heads)))
            order = torch.randperm(shape[0] * shape[1]) + num_blocks
            self.tables.append(order.to(torch.int32).view(shape))
            num_blocks += order.numel()
        self.cache = torch.full((num_blocks, 2, PAGE, config.head_dim), float("nan"))


def per_layer(values: list[list[int]]) -> Tensor:
    """(tokens, layers) to (layers, tokens)."""
    return torch.tensor(values, dtype=torch.int32).t().contiguous()


@compiled
@pytest.mark.parametrize("name", list(CASES))
def test_iterations_agree_with_the_decoder(name: str) -> None:
    decoder = random_decoder(name)
    if why_not_native(decoder) is not None:
        with pytest.raises(FlextronError, match="multiple of 8"):
            NativeStep(decoder, PAGE)
        return
    assert_iterations_agree(NativeStep(decoder, PAGE), decoder, decoder)
    for adapters in adapters_of(decoder.config):
        assert_iterations_agree(NativeStep(decoder, PAGE), decoder, decoder, adapters)


@compiled
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_quantized_iterations_agree_with_rounded_weights_and_tokens(name: str, weights: Weights) -> None:
    decoder = random_decoder(name)
    reference = rounded_decoder(decoder, weights)
    native = NativeStep(decoder, PAGE, weights)
    with whole_number_products(decoder, reference, weights):
        assert_iterations_agree(native, decoder, reference)
        for adapters in adapters_of(decoder.config):
            assert_iterations_agree(native, decoder, reference, adapters)


@cache
def wide_decoders() -> tuple[Decoder, Decoder]:
    """One of three groups of 32 columns, an odd number, and its rounded copy."""
    sizes = SIZES | {"hidden_size": 96, "intermediate_size": 75, "num_hidden_layers": 2}
    torch.manual_seed(0)
    decoder = Decoder(config_from_hf(LlamaConfig(**sizes, **HEADS).to_dict())).eval().requires_grad_(False)
    for p in decoder.parameters():
        p.normal_(0, 0.2) if p.dim() > 1 else p.normal_(1, 0.3)
    return decoder, rounded_decoder(decoder, "int4")


@compiled
@pytest.mark.parametrize("num_tokens", range(1, 21))
def test_int4_with_any_number_of_tokens(num_tokens: int) -> None:
    """A sequence in the full network beside one in a sub-network of odd widths."""
    decoder, reference = wide_decoders()
    config = decoder.config
    narrow = LayerSpec(intermediate_size=37, num_groups=1)
    specs = [config.full_spec, SubnetSpec(layers=(narrow,) * config.num_hidden_layers)]
    lengths = [num_tokens - num_tokens // 3, num_tokens // 3]
    sequences = [torch.randint(config.vocab_size, (n,)) for n in lengths if n]
    owners = [i for i, n in enumerate(lengths) for _ in range(n)]
    units = config.num_hidden_layers * config.num_groups
    tables = torch.arange(2 * 5 * units, dtype=torch.int32).view(2, 5, units)
    got = NativeStep(decoder, PAGE, "int4")(
        torch.cat(sequences),
        torch.cat([torch.arange(n) for n in lengths]),
        per_layer([[layer.intermediate_size for layer in specs[i].layers] for i in owners]),
        per_layer([[layer.num_groups for layer in specs[i].layers] for i in owners]),
        [tables[i] for i in owners],
        per_layer([[config.num_groups * layer for layer in range(config.num_hidden_layers)] for _ in owners]),
        torch.full((2 * 5 * units, 2, PAGE, config.head_dim), float("nan")),
        range(num_tokens),
    )
    with whole_number_products(decoder, reference, "int4"):
        hidden_ND = rounded_tokens(reference(Batch.ragged(sequences, specs[: len(sequences)])))
    wanted = hidden_ND @ rounded(decoder.head_weight, "int8").t()
    assert_near_after_rounding(got, wanted)


@compiled
def test_int4_needs_whole_groups() -> None:
    sizes, heads = SIZES | {"hidden_size": 40}, HEADS | {"num_attention_heads": 5, "num_key_value_heads": 5}
    decoder = Decoder(config_from_hf(LlamaConfig(**sizes, **heads).to_dict())).requires_grad_(False)
    NativeStep(decoder, PAGE, "int8")
    with pytest.raises(FlextronError, match="multiple of 32, not 40; use int8"):
        NativeStep(decoder, PAGE, "int4")


def assert_near_after_rounding(got: Tensor, wanted: Tensor) -> None:
    """The last digit of a sum can turn a number between two steps, of which 127 reach a token's largest.

    That moves some tokens by more than the arithmetic does; with four bits, 16-bit numbers do it often.
    """
    errors = (got - wanted).abs().amax(1) / float(wanted.abs().max())
    assert float(errors.min()) <= 1e-3
    assert float(errors.max()) <= 2e-2


def adapters_of(config: DecoderConfig) -> list[list[Adapter | None]]:
    """Of the sequences in two runs: ranks around the kernels' width, some linears, and both methods."""
    lora, wide = random_lora(config, rank=5), random_lora(config, rank=61, seed=1, targets=["k", "o", "up"])
    ia3 = random_ia3(config)
    return [
        [lora, None, wide, lora],
        [ia3, random_lora(config, rank=16, seed=2, targets=["q", "v", "down"]), ia3, None],
    ]


def assert_iterations_agree(
    native: NativeStep, decoder: Decoder, reference: Decoder, adapters: Sequence[Adapter | None] = (None,) * 4
) -> None:
    """Prompts in chunks and single tokens of ragged sub-networks give what whole sequences give."""
    specs = ragged_specs(decoder.config, len(LENGTHS))
    sequences = [torch.randint(decoder.config.vocab_size, (n,)) for n in LENGTHS]
    # a tied head is rounded, the embedding that is looked up is not
    head = decoder.head_weight if native.weights == "float32" else rounded(decoder.head_weight, "int8")
    hidden_ND = reference(Batch.ragged(sequences, specs, adapters=adapters)).detach()
    if native.weights != "float32":
        hidden_ND = rounded_tokens(hidden_ND)
    wanted = capped(hidden_ND @ head.t(), decoder.config.logits_cap)
    natives = [None if a is None else NativeAdapter(a) for a in adapters]
    pages = Pages(decoder, specs)
    got: list[list[tuple[int, Tensor]]] = [[] for _ in LENGTHS]
    for parts in ITERATIONS:
        owners = [i for i, first, end in parts for _ in range(first, end)]
        tokens = torch.cat([sequences[i][first:end] for i, first, end in parts])
        positions = torch.cat([torch.arange(first, end) for _, first, end in parts])
        # scores after all tokens of some sequences, after none of others
        wished = [t for t, i in enumerate(owners) if i != 3] if len(owners) % 2 else list(range(len(owners)))
        scores = native(
            tokens,
            positions,
            per_layer([[layer.intermediate_size for layer in specs[i].layers] for i in owners]),
            per_layer([[layer.num_groups for layer in specs[i].layers] for i in owners]),
            [pages.tables[i] for i in owners],
            per_layer([pages.offsets[i] for i in owners]),
            pages.cache,
            wished,
            [natives[i] for i in owners] if any(natives) else None,
        )
        for t, row in zip(wished, scores, strict=True):
            got[owners[t]].append((int(positions[t]), row))
    if native.weights == "int4":
        rows = torch.cat([torch.stack([row for _, row in seen]) for seen in got])
        places = [sum(LENGTHS[:i]) + position for i, seen in enumerate(got) for position, _ in seen]
        assert_near_after_rounding(rows, wanted[places])
        return
    near = 1e-5 if native.weights == "float32" else 1e-3
    for seen, whole in zip(got, wanted.split(list(LENGTHS)), strict=True):
        assert seen
        for position, row in seen:
            torch.testing.assert_close(row, whole[position], rtol=near, atol=near * float(wanted.abs().max()))


def test_adapters_without_kernels_say_why() -> None:
    config = random_decoder("llama").config
    assert why_adapter_not_native(random_ia3(config)) is None
    adapter = random_ia3(config, targets=["v"], input_targets=["v"])
    assert why_adapter_not_native(adapter) == "there are no kernels for factors of the inputs of v"
    with pytest.raises(FlextronError, match="inputs of v"):
        NativeAdapter(adapter)


def test_without_a_compiler_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEXTRON_NATIVE", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    load_library.cache_clear()
    try:
        said = load_library("decoder")
        assert isinstance(said, str)
        assert "no-such-compiler" in said
    finally:
        load_library.cache_clear()


@compiled
def test_loading_leaves_denormal_numbers_alone() -> None:
    load_library("decoder")
    assert 5e-324 > 0
    assert float(torch.tensor(1e-40) * 1) > 0
