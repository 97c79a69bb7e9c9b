"""Counting parameters, bytes and operations from shapes, against the tensors themselves."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flextron.elastic import extract
from flextron.model.attention import CachedAttention
from flextron.model.batch import Batch
from flextron.model.cost import (
    block_parameters,
    kv_bytes_per_token,
    layer_parameters,
    num_parameters,
    step_flops,
)
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import (
    CASES,
    MECHANISMS,
    decoder_of,
    random_decoder_of,
    random_model,
    random_tokens,
)


def specs_for(decoder: Decoder) -> list[SubnetSpec]:
    groups = decoder.config.num_groups
    return [
        decoder.widths,
        SubnetSpec.of([1, 1, 1], [1, 1, 1]),
        SubnetSpec.of([7, 0, 40], [groups, 0, 1]),
        SubnetSpec.of([0, 13, 0], [1, 0, groups]),
    ]


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_extracted_model(case: str) -> None:
    model = random_model(case)
    decoder = decoder_of(model)
    assert num_parameters(decoder.config, decoder.widths) == model.num_parameters()
    for spec in specs_for(decoder):
        dense = extract(decoder, spec)
        counts = [sum(p.numel() for p in layer.parameters()) for layer in dense.layers]
        assert [layer_parameters(decoder.config, layer) for layer in spec.layers] == counts
        assert block_parameters(decoder.config, spec) == sum(counts)
        assert num_parameters(decoder.config, spec) == sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize("case", MECHANISMS)
def test_bytes_of_keys_and_values_are_those_of_a_cache(case: str) -> None:
    decoder = random_decoder_of(case)
    for spec in specs_for(decoder):
        size = [
            CachedAttention(
                decoder.config, [(spec, 1)], capacity, dtype=torch.float32, device=torch.device("cpu")
            ).num_bytes
            for capacity in (10, 11)
        ]
        assert size[1] - size[0] == kv_bytes_per_token(decoder.config, spec)
        assert kv_bytes_per_token(decoder.config, spec, 2) == (size[1] - size[0]) // 2


@pytest.mark.parametrize("case", ["llama", "llama-mqa", "gpt2"])
def test_operations_of_the_products_are_those_that_run(case: str) -> None:
    decoder = random_decoder_of(case).requires_grad_(True)
    tokens = random_tokens(2, 8)
    for spec in specs_for(decoder)[:3]:
        batch = Batch.padded(tokens, spec)
        x = decoder.embed(batch).detach().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            hidden = decoder(batch)
            hidden.sum().backward()
        products = sum(
            flops
            for name, flops in counter.get_flop_counts()["Global"].items()
            if "attention" not in str(name) and "bmm" not in str(name)
        )
        # all but the attention's own products, which are the term in the square of the length
        ours = step_flops(decoder.config, spec, num_sequences=2, length=8)
        square = (
            3
            * 2
            * 2
            * 8
            * sum(2 * layer.num_groups * decoder.config.query_rows_per_group * 8 // 2 for layer in spec.layers)
        )
        assert x.requires_grad
        assert products == ours - square
