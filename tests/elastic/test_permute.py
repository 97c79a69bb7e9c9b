"""Permuting changes where units lie and nothing else: the full model's function stays, in stock `transformers` too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flextron.checkpoints.weights import write_checkpoint
from flextron.elastic import Importance, permute, rank
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import (
    CASES,
    decoder_of,
    hf_config_of,
    hf_logits,
    our_logits,
    random_decoder_of,
    random_model,
    random_tokens,
    relative_error,
    stock,
)

TOKENS = random_tokens(2, 14)


def shuffled(decoder: Decoder, seed: int = 0) -> Importance:
    """Orders at random, different in each layer and none of them the identity."""
    generator = torch.Generator().manual_seed(seed)
    layers = range(decoder.config.num_hidden_layers)
    groups = [torch.randperm(decoder.config.num_groups, generator=generator) for _ in layers]
    groups[0] = torch.arange(decoder.config.num_groups).roll(1)
    return Importance(
        method="activation",
        num_tokens=0,
        neurons=tuple(torch.randperm(decoder.config.intermediate_size, generator=generator) for _ in layers),
        groups=tuple(groups),
        layer_scores=(0.0,) * len(layers),
    )


@pytest.mark.parametrize("case", CASES)
def test_permuted_model_is_the_same_function_and_a_stock_checkpoint(case: str, tmp_path: Path) -> None:
    model = random_model(case)
    reference = hf_logits(model, TOKENS)
    decoder = decoder_of(model)
    before = {name: p.clone() for name, p in decoder.named_parameters()}
    permute(decoder, shuffled(decoder))
    moved = {name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])}
    assert {"layers.0.mlp.up.weight", "layers.0.mlp.down.weight", "layers.0.attention.q.weight"} <= moved
    with torch.no_grad():
        assert relative_error(our_logits(decoder, TOKENS), reference) <= 1e-5
    write_checkpoint(decoder, tmp_path, hf_config=hf_config_of(model), tokenizer=None)
    back = stock(tmp_path)
    assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert relative_error(hf_logits(back, TOKENS), reference) <= 1e-5


@pytest.mark.parametrize("case", ["llama", "llama-mqa", "gpt2", "neox"])
@pytest.mark.parametrize("method", ["activation", "reconstruction"])
def test_after_permuting_importance_falls_along_every_axis(case: str, method: str) -> None:
    decoder = random_decoder_of(case)
    importance = rank(decoder, TOKENS, "activation" if method == "activation" else "reconstruction")
    permute(decoder, importance)
    again = rank(decoder, TOKENS, importance.method)
    for order in (*again.neurons, *again.groups):
        assert order.tolist() == list(range(len(order)))


@pytest.mark.parametrize("case", ["llama-3", "llama-mqa", "neox"])
def test_the_first_units_are_the_most_important_ones(case: str) -> None:
    decoder, original = (random_decoder_of(case) for _ in range(2))
    importance = shuffled(decoder)
    permute(decoder, importance)
    # a sub-network of one unit a layer is the original with all but the chosen units removed
    config = original.config
    with torch.no_grad():
        for layer, neurons, groups in zip(original.layers, importance.neurons, importance.groups, strict=True):
            inputs = torch.zeros(config.intermediate_size)
            inputs[neurons[0]] = 1
            layer.get_parameter("mlp.down.weight").mul_(inputs[:, None])
            rows = torch.zeros(config.num_groups, config.query_rows_per_group)
            rows[groups[0]] = 1
            layer.get_parameter("attention.o.weight").mul_(rows.flatten()[:, None])
        spec = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=1, num_groups=1)
        assert relative_error(our_logits(decoder, TOKENS, spec), our_logits(original, TOKENS)) <= 1e-5
