"""Bypasses against weights into which they are merged, alone and in one batch, in full and in narrow sub-networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.model.adapter import TARGETS, Adapter
from flextron.model.attention import CachedAttention
from flextron.model.batch import Batch, Segment, TokenChoice
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import MECHANISMS, random_tokens, relative_error
from tests.model.adapter_cases import merged, random_ia3, random_lora, targets_of
from tests.random_decoders import ragged_specs, random_decoder

LENGTHS = (5, 3, 7, 4, 6, 1)


def run(decoder: Decoder, tokens: Tensor, spec: SubnetSpec, adapter: Adapter | None = None) -> Tensor:
    return decoder(Batch.ragged([tokens], [spec], adapters=[adapter]))


@pytest.mark.parametrize("case", MECHANISMS)
@pytest.mark.parametrize("make", [random_lora, random_ia3])
def test_an_adapter_does_what_merged_weights_do_in_every_sub_network(case: str, make: type) -> None:
    decoder = random_decoder(case).double()
    adapter = make(decoder.config).double()
    reference = merged(decoder, adapter)
    for spec in ragged_specs(decoder.config, 4):
        tokens = random_tokens(9)
        ours, theirs = run(decoder, tokens, spec, adapter), run(reference, tokens, spec)
        assert relative_error(ours, theirs) <= 1e-10
    assert relative_error(run(decoder, tokens, spec), theirs) > 1e-3  # the adapter matters


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", [random_lora, random_ia3])
def test_each_linear_alone(target: str, make: type) -> None:
    decoder = random_decoder("llama-3").double()
    adapter = make(decoder.config, targets=[target]).double()
    tokens = random_tokens(9)
    ours = run(decoder, tokens, decoder.widths, adapter)
    assert relative_error(ours, run(merged(decoder, adapter), tokens, decoder.widths)) <= 1e-10
    assert relative_error(ours, run(decoder, tokens, decoder.widths)) > 1e-3


@pytest.mark.parametrize("case", ["llama-3", "llama-mqa", "neox"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_adapters_in_one_batch_equal_each_alone(case: str, with_gradients: bool) -> None:
    decoder = random_decoder(case).double()
    config = decoder.config
    own = [
        random_lora(config, 2, 1),
        None,
        random_ia3(config, 2),
        random_lora(config, 5, 3, targets=["q", "down"]),
        random_ia3(config, 4, targets=["v", "o", "up"], input_targets=["up"]),
        random_lora(config, 1, 5),
    ]
    adapters = [a and a.double() for a in own]
    specs = ragged_specs(config, len(LENGTHS))
    sequences = [random_tokens(n, seed=n) for n in LENGTHS]
    with torch.set_grad_enabled(with_gradients):
        together = decoder(Batch.ragged(sequences, specs, adapters=adapters)).split(LENGTHS)
    for tokens, spec, adapter, ours in zip(sequences, specs, adapters, together, strict=True):
        assert relative_error(ours, run(decoder, tokens, spec, adapter)) <= 1e-10


def test_decoding_with_adapters_equals_running_whole_texts() -> None:
    decoder = random_decoder("qwen3").double()
    adapters = [random_lora(decoder.config, 2).double(), random_ia3(decoder.config).double()]
    specs = [decoder.widths] * 2
    sequences = list(random_tokens(2, 8))
    whole = decoder(Batch.ragged(sequences, specs, adapters=adapters)).unflatten(0, (2, 8))
    segments = [(decoder.widths, 1)] * 2
    cache = CachedAttention(decoder.config, segments, 8, dtype=torch.float64)
    steps = []
    for t in range(8):
        batch = Batch.ragged([s[t : t + 1] for s in sequences], specs, [t, t], adapters=adapters)
        steps.append(decoder(batch, cache))
        cache.advance([[1], [1]])
    assert relative_error(torch.stack(steps, 1), whole) <= 1e-10


@pytest.mark.parametrize("make", [random_lora, random_ia3])
def test_narrowed_adapters_are_the_leading_parts(make: type) -> None:
    decoder = random_decoder("llama")
    adapter = make(decoder.config)
    spec = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=24, num_groups=1, skip=[1])
    narrow = adapter.narrowed(spec)
    tokens = random_tokens(9)
    assert narrow.adapted_layers == (0, 2)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in adapter.parameters())
    assert torch.equal(run(decoder, tokens, spec, narrow), run(decoder, tokens, spec, adapter))
    with pytest.raises(FlextronError, match="narrower sub-network"):
        run(decoder, tokens, decoder.widths, narrow)
    with pytest.raises(FlextronError, match="narrower sub-network"):
        narrow.narrowed(decoder.widths)


def test_fresh_adapters_change_nothing() -> None:
    decoder = random_decoder("qwen2")
    tokens = random_tokens(9)
    for adapter in (Adapter.lora(decoder.config, rank=4, alpha=8), Adapter.ia3(decoder.config)):
        ours = run(decoder, tokens, decoder.widths, adapter)
        assert torch.equal(ours, run(decoder, tokens, decoder.widths))


class _Half(TokenChoice):
    def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.arange(len(x_ND)) % 2 * 8 + 8, None

    def check(self, config: object, spec: SubnetSpec) -> None:
        pass


def test_adapters_of_attention_run_beside_token_routers_and_others_are_refused() -> None:
    decoder = random_decoder("llama")
    tokens, router = random_tokens(9), _Half()
    attention = random_lora(decoder.config, targets=["q", "k", "v", "o"])
    ours = decoder(Batch.ragged([tokens], [decoder.widths], routers=[router], adapters=[attention]))
    theirs = merged(decoder, attention)(Batch.ragged([tokens], [decoder.widths], routers=[router]))
    assert relative_error(ours, theirs) <= 1e-5
    with pytest.raises(FlextronError, match="token router"):
        Segment(decoder.widths, (3,), router=router, adapter=random_lora(decoder.config))
    both = [decoder.widths] * 2
    mixed = Batch.ragged([tokens, tokens], both, routers=[router, None], adapters=[None, random_lora(decoder.config)])
    with pytest.raises(FlextronError, match="run them apart"):
        decoder(mixed)


def test_bad_adapters_are_refused() -> None:
    config = random_decoder("gpt2").config
    assert "gate" not in targets_of(config)
    with pytest.raises(FlextronError, match="no linear 'gate'"):
        Adapter.lora(config, rank=4, alpha=8, targets=["q", "gate"])
    with pytest.raises(FlextronError, match="at least 1"):
        Adapter.lora(config, rank=0, alpha=8)
    with pytest.raises(FlextronError, match="no bypass at all"):
        Adapter.ia3(config, targets=[])
