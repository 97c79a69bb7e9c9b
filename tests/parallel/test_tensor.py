"""Shards on two processes against the whole decoder in each, in float64; collectives are counted, not inferred.

The functions that take a device run on every rank at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from flextron.errors import FlextronError
from flextron.finetuning.layerwise import Finetuning
from flextron.finetuning.units import Stage
from flextron.generation.generate import SamplingParams, generate
from flextron.kernels.decoder import why_not_native
from flextron.model.adapter import TARGETS, Adapter
from flextron.model.batch import Batch, Segment
from flextron.model.bypass import Bypass
from flextron.model.decoder import Decoder
from flextron.parallel.tensor import TensorParallel
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import CASES, MECHANISMS, random_tokens, relative_error
from tests.finetuning.test_layerwise import examples_of, gradients, plain, run
from tests.model.adapter_cases import random_ia3, random_lora, targets_of
from tests.random_decoders import random_decoder
from tests.ranks import Collectives, Ranks

BAR = 1e-10
LENGTHS = (5, 3, 7, 4)


def specs_of(decoder: Decoder) -> list[SubnetSpec]:
    """Even and odd widths, halves and a layer skipped, one for each of `LENGTHS`; a rank lacks some of the narrow."""
    n, full = decoder.config.num_groups, decoder.config.intermediate_size
    return [
        decoder.widths,
        SubnetSpec.of([7, 0, 23], [n, 1, 0]),
        SubnetSpec.of([full, 0, 1], [1, 0, n]),
        SubnetSpec.of([8, 8, 7], [2, 2, 2]),
    ]


def whole_decoder(case: str, device: torch.device) -> Decoder:
    return random_decoder(case).double().to(device)


def inverse_ia3(config: object, seed: int = 0) -> Adapter:
    """IA3 on the other side of each linear: inputs of those into a nested dimension, outputs of those out of it."""
    return random_ia3(config, seed, input_targets=("q", "k", "v", "gate", "up"))  # type: ignore[arg-type]


def mixed_adapters(decoder: Decoder, device: torch.device) -> list[Adapter | None]:
    made = [random_lora(decoder.config, 3, 1), random_ia3(decoder.config, 2), None, inverse_ia3(decoder.config, 3)]
    return [a and a.double().to(device) for a in made]


def batch_of(specs: Sequence[SubnetSpec], adapters: Sequence[Adapter | None], device: torch.device) -> Batch:
    sequences = [random_tokens(n, seed=n).to(device) for n in LENGTHS]
    return Batch.ragged(sequences, specs, adapters=adapters)


def gathered_gradients(ranks: TensorParallel, shard: Adapter) -> dict[str, Tensor]:
    """The whole gradients of a share whose own are complete, by name."""
    held = copy.deepcopy(shard)
    for p, own in zip(held.parameters(), shard.parameters(), strict=True):
        p.data = torch.zeros_like(own) if own.grad is None else own.grad
    return {name: p.detach() for name, p in ranks.gather(held).named_parameters()}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name, g in expected.items():
        scale = max(float(g.abs().max()), 1e-6 * largest)
        assert float((ours[name] - g).abs().max()) <= BAR * scale, name


def compare_in_mixed_batches(device: torch.device, case: str) -> None:
    """Logits and the gradients of all adapters of a batch with many widths and methods."""
    decoder, ranks = whole_decoder(case, device), TensorParallel()
    shard, specs = ranks.decoder(decoder), specs_of(decoder)
    adapters = mixed_adapters(decoder, device)
    shares = [a and ranks.adapter(a) for a in adapters]
    logits = decoder.logits(decoder(batch_of(specs, adapters, device)))
    ours = shard.logits(shard(batch_of(specs, shares, device)))
    assert relative_error(ours, logits) <= BAR
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(device)
    (logits * weights).sum().backward()
    (ours * weights).sum().backward()
    for adapter, share in zip(adapters, shares, strict=True):
        if adapter is not None and share is not None:
            ranks.sum_gradients(share)
            assert_same(gathered_gradients(ranks, share), gradients(adapter))


@pytest.mark.parametrize("case", [case for case in MECHANISMS if case != "olmo2"])
def test_shards_return_what_the_whole_decoder_does_and_so_do_their_gradients(ranks: Ranks, case: str) -> None:
    ranks.run(compare_in_mixed_batches, case)


def refuse_a_norm_of_all_heads(device: torch.device) -> None:
    """Its sum is over what the ranks share."""
    with pytest.raises(FlextronError, match="normalises the queries of all heads as one"):
        TensorParallel().decoder(whole_decoder("olmo2", device))


def test_a_norm_of_all_heads_is_refused(ranks: Ranks) -> None:
    ranks.run(refuse_a_norm_of_all_heads)


def compare_each_linear(device: torch.device, case: str) -> None:
    """One bypass in all layers, one method after the other; several sub-networks."""
    decoder, ranks = whole_decoder(case, device), TensorParallel()
    shard = ranks.decoder(decoder)
    tokens = random_tokens(6).to(device)
    for target in targets_of(decoder.config):
        for make in (random_lora, random_ia3, inverse_ia3):
            whole = make(decoder.config).double().to(device)
            adapter = Adapter(
                decoder.config, decoder.widths, lambda i, t, _, w=whole, x=target: w.at(i)[t] if t == x else None
            )
            share = ranks.adapter(adapter)
            for spec in (decoder.widths, specs_of(decoder)[3]):
                hidden = decoder(Batch.ragged([tokens], [spec], adapters=[adapter]))
                ours = shard(Batch.ragged([tokens], [spec], adapters=[share]))
                assert relative_error(ours, hidden) <= BAR
                hidden.square().sum().backward()
                ours.square().sum().backward()
                ranks.sum_gradients(share)
                assert_same(gathered_gradients(ranks, share), gradients(adapter))
                share.zero_grad()


@pytest.mark.parametrize("case", ["llama-3", "llama-mqa"])
def test_each_linear_alone(ranks: Ranks, case: str) -> None:
    ranks.run(compare_each_linear, case)


def count_collectives(device: torch.device, case: str, which: str | None) -> list[list[tuple[str, int]]]:
    """Of the forward pass, the backward pass and the sum of gradients, down to the embeddings."""
    decoder, ranks = whole_decoder(case, device), TensorParallel()
    shard, specs = ranks.decoder(decoder), specs_of(decoder)
    shard.embedding.weight.requires_grad_()
    adapters: list[Adapter | None] = [None] * len(specs)
    if which == "mixed":
        adapters = mixed_adapters(decoder, device)
    elif which is not None:
        adapters = [{"lora": random_lora, "ia3": random_ia3, "ia3-inverse": inverse_ia3}[which](decoder.config)] * 4
    shares = [a and ranks.adapter(a.double().to(device)) for a in adapters]
    with Collectives() as forward:
        hidden = shard(batch_of(specs, shares, device))
    with Collectives() as backward:
        hidden.square().sum().backward()
    assert shard.embedding.weight.grad is not None
    with Collectives() as step:
        if shares[0] is not None:
            ranks.sum_gradients(shares[0])
    return [forward.calls, backward.calls, step.calls]


@pytest.mark.parametrize("case", ["llama", "llama-mqa", "neox"])
def test_bypasses_add_no_collective_and_no_byte(ranks: Ranks, case: str) -> None:
    one, other = ranks.run(count_collectives, case, None)
    assert one == other
    forward, backward, step = one
    hidden_bytes = sum(LENGTHS) * CASES[case].hidden_size * 8
    assert forward == [("allreduce_", hidden_bytes)] * 2 * 3  # two halves, three layers
    assert backward == [("allreduce_", hidden_bytes)] * 2 * 3
    assert step == []
    for which in ("lora", "ia3", "ia3-inverse", "mixed"):
        for forward, backward, step in ranks.run(count_collectives, case, which):
            assert [forward, backward] == one[:2], which
            assert len(step) == (0 if which == "ia3" and case != "llama-mqa" else 1), which


def train_in_chunks(device: torch.device, case: str, keep: tuple[str, ...]) -> list[list[tuple[str, int]]]:
    """Two steps of stochastic gradient descent, accumulated from chunks; the collectives of one pass."""
    decoder, ranks = whole_decoder(case, device), TensorParallel()
    spec = specs_of(decoder)[3]
    adapter = random_lora(decoder.config).double().to(device)
    shard, share = ranks.decoder(decoder), ranks.adapter(adapter)
    optimizers = [torch.optim.SGD(a.parameters(), lr=1e-3, momentum=0.9) for a in (adapter, share)]
    for step in range(2):
        examples = examples_of([13, 6, 9], seed=step)
        if device.type == "cpu":
            loss = plain(decoder, adapter, examples, spec)
        else:  # `plain` knows of no devices
            reference = Finetuning(decoder, adapter, examples, spec=spec)
            run(reference, [99], [99])
            loss = reference.loss
        with Collectives() as forward:
            work = Finetuning(shard, share, examples, spec=spec, keep=keep)
            while work.stage is not Stage.BACKWARD:
                work.run(10)  # 25 tokens: chunks of 10, 10 and 5
        with Collectives() as backward:
            while work.run(10):
                pass
        assert work.loss == pytest.approx(loss, rel=BAR)
        ranks.sum_gradients(share)
        ours = gathered_gradients(ranks, share)
        assert_same(ours, {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None})
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(dict(ranks.gather(share).named_parameters()), dict(adapter.named_parameters()))
    return [forward.calls, backward.calls]


@pytest.mark.parametrize("case", ["llama", "qwen3", "neox"])
@pytest.mark.parametrize("keep", [(), ("q", "attention", "o", "gate", "up")], ids=["recomputed", "kept"])
def test_finetuning_in_chunks(ranks: Ranks, case: str, keep: tuple[str, ...]) -> None:
    one, other = ranks.run(train_in_chunks, case, keep)
    assert one == other
    forward, backward = one
    chunks = [("allreduce_", n * CASES[case].hidden_size * 8) for n in (10, 10, 5)]
    assert forward == [w for _ in range(3) for w in chunks for _ in range(2)]  # layer by layer
    # A layer sends back two sums, the lowest none to its input; what attention gave is summed again unless it is kept
    # or nothing reads it, as where attention and MLP run side by side.
    again = 0 if keep or case == "neox" else 1
    lowest = 0 if case == "neox" else 1
    assert backward == [w for sums in (2, 2, lowest) for w in chunks for _ in range(sums + again)]


def compare_texts(device: torch.device) -> None:
    decoder, ranks = random_decoder("llama").to(device), TensorParallel()
    shard = ranks.decoder(decoder)
    assert why_not_native(shard) == "the weights are shared by 2 ranks"
    prompts = [row.tolist() for row in random_tokens(2, 5)]
    for spec in specs_of(decoder):
        whole, ours = (
            generate(d, prompts, s, SamplingParams(max_tokens=6)) for d, s in ((decoder, spec), (shard, spec))
        )
        assert ours == whole


def test_shards_generate_the_same_text(ranks: Ranks) -> None:
    ranks.run(compare_texts)


def compare_parts(device: torch.device, case: str) -> None:
    decoder, ranks = whole_decoder(case, device), TensorParallel()
    for adapter in filter(None, mixed_adapters(decoder, device)):
        share = ranks.adapter(adapter)
        whole = ranks.gather(share)
        assert whole.widths == adapter.widths
        for ours, theirs in zip(whole.parameters(), adapter.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        count, own = (sum(p.numel() for p in a.parameters()) for a in (adapter, share))
        assert count / 2 <= own <= count
    shard = ranks.decoder(decoder)
    halves = (p.numel() for p in shard.layers.parameters() if p.dim() > 1)
    assert case == "llama-mqa" or 2 * sum(halves) == sum(p.numel() for p in decoder.layers.parameters() if p.dim() > 1)
    assert shard.embedding.weight.data_ptr() == decoder.embedding.weight.data_ptr()
    assert not any(p.requires_grad for p in shard.parameters())


@pytest.mark.parametrize("case", ["llama-3", "llama-mqa", "gpt2"])
def test_what_each_rank_holds_and_the_way_back(ranks: Ranks, case: str) -> None:
    ranks.run(compare_parts, case)


class _Shift(Bypass):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))


class _AnyRouter:
    def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def check(self, config: object, spec: SubnetSpec) -> None:
        raise NotImplementedError


def refusals(device: torch.device) -> list[str]:
    decoder, ranks = random_decoder("llama").to(device), TensorParallel()
    shard, tokens = ranks.decoder(decoder), random_tokens(3).to(device)
    shift = Adapter(decoder.config, decoder.widths, lambda i, t, _: _Shift() if t == "q" else None)
    routed = Batch(tokens, torch.arange(3, device=device), (Segment(shard.widths, (3,), router=_AnyRouter()),))
    attempts: list[Callable[[], object]] = [
        lambda: ranks.decoder(Decoder(decoder.config, SubnetSpec.of([8, 8, 1], [2, 2, 2]))),
        lambda: ranks.decoder(Decoder(decoder.config, SubnetSpec.of([8, 8, 8], [2, 1, 2]))),
        lambda: Finetuning(shard, random_lora(decoder.config), examples_of([3], seed=0), spec=specs_of(decoder)[1]),
        lambda: ranks.adapter(shift),
        lambda: shard(routed),
    ]
    said = []
    for attempt in attempts:
        with pytest.raises(FlextronError) as error:
            attempt()
        said.append(str(error.value))
    return said


def test_what_cannot_be_cut_is_refused(ranks: Ranks) -> None:
    for neurons, groups, narrow, bypass, router in ranks.run(refusals):
        assert neurons == "2 ranks cannot share the 1 MLP neurons of layer 2; use at most 1"
        assert "the 1 attention groups of layer 1" in groups
        assert "2 ranks cannot train in widths of 1" in narrow
        assert "_Shift cannot be cut" in bypass
        assert "token routers cannot run" in router


def test_every_target_is_covered() -> None:
    assert set(targets_of(random_decoder("llama-3").config)) == set(TARGETS)
