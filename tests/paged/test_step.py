"""The batched iteration over pages against whole sequences without a cache, in float64, call by call."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.model.decoder import Decoder
from flextron.paged import PagedStep
from flextron.paged.graphs import Executor
from flextron.paged.step import _MOST_FORMS
from flextron.spec import SubnetSpec
from tests.model.adapter_cases import random_ia3, random_lora
from tests.paged.sequences import NUM_BLOCKS, PAGE, Blocks, Live, Replays, reference, run
from tests.random_decoders import ragged_specs, random_decoder

FAMILIES = ["llama", "gpt2", "mistral", "llama-mqa", "neox", "gemma2", "gemma3", "smollm3", "granite", "olmo2"]
BAR = 1e-9


@cache
def decoder_of(name: str) -> Decoder:
    return random_decoder(name).double()


def paged(decoder: Decoder, executor: Executor | None) -> PagedStep:
    step = PagedStep(decoder, num_blocks=NUM_BLOCKS, page_size=PAGE, executor=executor)
    step.cache.normal_(0, 10)  # what others have left there
    step.cache[-1] = 0
    return step


def networks(decoder: Decoder) -> list[tuple[SubnetSpec, object]]:
    """Sub-networks without adapters and with adapters of two kinds."""
    specs = ragged_specs(decoder.config, 3)
    lora, ia3 = (a.double() for a in (random_lora(decoder.config, rank=3), random_ia3(decoder.config, seed=1)))
    return [(specs[0], None), (specs[1], lora), (specs[2], None), (specs[2], lora), (specs[2], ia3)]


def tokens(rng: random.Random, decoder: Decoder, count: int) -> list[int]:
    return [rng.randrange(decoder.config.vocab_size) for _ in range(count)]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("replays", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_batches_give_what_whole_sequences_give(name: str, replays: bool) -> None:
    """Prompts in chunks, decoding, five tokens at once to verify; sequences come and go."""
    decoder, rng = decoder_of(name), random.Random(name)
    executor = Replays() if replays else None
    step, blocks, live = paged(decoder, executor), Blocks(decoder, rng), list[Live]()
    kinds = networks(decoder)
    for i in range(24):
        while len(live) < 2 + i // 4 % 4:
            live.append(blocks.sequence(tokens(rng, decoder, rng.randint(6, 40)), *rng.choice(kinds)))
        live.sort(key=lambda s: next(k for k, kind in enumerate(kinds) if kind == (s.spec, s.adapter)))
        most = rng.choice([5, 30]) if i % 4 == 0 else 1
        lengths = [min(rng.randint(1, most) if most != 5 else 5, len(s.tokens) - s.done) for s in live]
        found = run(step, live, lengths)
        for sequence, length, hidden in zip(live, lengths, found, strict=True):
            assert error(hidden, reference(decoder, sequence, length)) < BAR
            sequence.done += length
        for sequence in [s for s in live if s.done == len(s.tokens)]:
            live.remove(sequence)
            blocks.release(sequence)
    if executor is not None:
        assert executor.num_replayed


def test_forms_come_again_while_a_batch_grows_and_shrinks() -> None:
    """As many forms as sizes and pages have buckets; the same ones serve the next requests."""
    decoder, rng, executor = decoder_of("llama"), random.Random(0), Replays()
    step, blocks = paged(decoder, executor), Blocks(decoder, rng)
    spec = decoder.config.full_spec
    captured = []
    for _ in range(2):
        live = [blocks.sequence(tokens(rng, decoder, rng.randint(8, 14)), spec) for _ in range(7)]
        for sequence in live:
            run(step, [sequence], [6])
            sequence.done = 6
        while live:
            found = run(step, live, [1] * len(live))
            for sequence, hidden in zip(live, found, strict=True):
                assert error(hidden, reference(decoder, sequence, 1)) < BAR
                sequence.done += 1
            for sequence in [s for s in live if s.done == len(s.tokens)]:
                live.remove(sequence)
                blocks.release(sequence)
        captured.append(executor.num_captured)
    assert executor.num_captured <= 6
    assert executor.num_replayed > executor.num_captured
    assert len(step._kept) <= 6


def test_the_number_of_kept_forms_is_bounded_and_an_adapters_go_with_it() -> None:
    decoder, rng = decoder_of("llama"), random.Random(0)
    step, blocks = paged(decoder, Replays()), Blocks(decoder, rng)
    full, adapter = decoder.config.full_spec, random_lora(decoder.config, rank=2).double()
    narrow = [SubnetSpec.of([w] * 3, [g] * 3) for g in (1, 2) for w in range(1, full.intermediate_sizes[0] + 1)]
    assert len(narrow) > _MOST_FORMS
    for spec in narrow:
        sequence = blocks.sequence(tokens(rng, decoder, 2), spec)
        run(step, [sequence], [1])
        blocks.release(sequence)
    assert len(step._kept) == _MOST_FORMS
    adapted = blocks.sequence(tokens(rng, decoder, 3), full, adapter)
    run(step, [adapted], [1])
    assert any(s.adapter is adapter for form in step._kept for s in form.segments)
    step.forget(adapter)
    assert not any(s.adapter is adapter for form in step._kept for s in form.segments)


@pytest.mark.parametrize("replays", [False, True])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.sampled_from([1, 1, 1, 3, 9]), min_size=1, max_size=9))
def test_only_the_rows_of_new_tokens_and_the_rest_of_their_fresh_pages_change(
    replays: bool, seed: int, lengths: list[int]
) -> None:
    """Padding writes to a block of its own, and the block of zeros stays what it is."""
    decoder, rng = decoder_of("llama"), random.Random(seed)
    step, blocks = paged(decoder, Replays() if replays else None), Blocks(decoder, rng)
    kinds = networks(decoder)
    live = [blocks.sequence(tokens(rng, decoder, 20), *rng.choice(kinds)) for _ in lengths]
    for sequence in live:
        sequence.done = rng.randint(0, 11)
    before = step.cache.clone()
    run(step, live, lengths)
    may_change = torch.zeros(step.cache.shape[:3], dtype=torch.bool)
    may_change[NUM_BLOCKS] = True
    for sequence, length in zip(live, lengths, strict=True):
        for position in range(sequence.done, sequence.done + length):
            page, within = divmod(position, PAGE)
            for block in sequence.table[page, : sequence.num_blocks].tolist():
                may_change[block, :, within:] = True
    assert torch.equal(step.cache[~may_change], before[~may_change])
    assert not step.cache[-1].any()
    wrote = (step.cache != before).any(-1)[:NUM_BLOCKS].any()
    assert wrote or not any(s.num_blocks for s in live)


def test_prefixes_are_shared_and_a_narrow_network_uses_the_pages_of_a_wide_one() -> None:
    """Two sequences read the same first pages; a draft writes ahead, and the check writes over it."""
    decoder, rng = decoder_of("llama"), random.Random(3)
    step, blocks = paged(decoder, Replays()), Blocks(decoder, rng)
    full = decoder.config.full_spec
    shared = tokens(rng, decoder, 2 * PAGE)
    one = blocks.sequence(shared + tokens(rng, decoder, 9), full)
    run(step, [one], [len(one.tokens) - 4])
    two = blocks.sequence(shared + tokens(rng, decoder, 5), full)
    two.table[:2, : two.num_blocks] = one.table[:2, : one.num_blocks]
    one.done, two.done = len(one.tokens) - 4, 2 * PAGE
    narrow = SubnetSpec.of([5, 0, 16], [1, 2, 1])
    draft = replace(one.span(1), spec=narrow)
    step.run([draft], [0])
    found = run(step, [one, two], [4, 4])
    for sequence, hidden in zip((one, two), found, strict=True):
        assert error(hidden, reference(decoder, sequence, 4)) < BAR


@pytest.mark.parametrize("replays", [False, True])
def test_what_is_no_number_stays_with_its_sequence(replays: bool) -> None:
    """An adapter that went astray poisons its own pages, which others get later, and the padding beside it."""
    decoder, rng = decoder_of("llama"), random.Random(4)
    step, blocks = paged(decoder, Replays() if replays else None), Blocks(decoder, rng)
    full = decoder.config.full_spec
    broken = random_lora(decoder.config, rank=2).double()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    bad = [blocks.sequence(tokens(rng, decoder, 12), full, broken) for _ in range(3)]
    good = blocks.sequence(tokens(rng, decoder, 12), full)
    for length in (9, 1, 1, 1):
        found = run(step, [good, *bad], [length] * 4)
        assert error(found[0], reference(decoder, good, length)) < BAR
        assert all(hidden.isnan().all() for hidden in found[1:])
        for sequence in (good, *bad):
            sequence.done += length
    for sequence in bad:
        blocks.release(sequence)
    blocks.free.sort(key=lambda b: not step.cache[b].isnan().any(), reverse=True)
    fresh = blocks.sequence(tokens(rng, decoder, 12), full)
    assert step.cache[fresh.table[:3, : fresh.num_blocks].flatten().long()].isnan().any()
    for length in (9, 1, 1, 1):
        (hidden,) = run(step, [fresh], [length])
        assert error(hidden, reference(decoder, fresh, length)) < BAR
        fresh.done += length


@pytest.mark.parametrize("name", FAMILIES)
def test_another_device_is_never_waited_for_nor_given_host_memory(name: str) -> None:
    """Tensors without memory stand for the device's: whoever asks for their values fails."""
    decoder, rng = random_decoder(name).to("meta"), random.Random(5)
    executor = Replays("meta")
    step = PagedStep(decoder, num_blocks=NUM_BLOCKS, page_size=PAGE, executor=executor)
    adapter = random_lora(decoder.config, rank=3).to("meta")
    specs, blocks = ragged_specs(decoder.config, 3), Blocks(decoder, rng)
    live = [blocks.sequence(tokens(rng, decoder, 20), specs[i % 3], adapter if i > 2 else None) for i in range(5)]
    for length in (7, 1, 1, 1):  # of these the last three share a form
        for hidden in run(step, live, [length] * 5):
            assert hidden.shape == (length, decoder.config.hidden_size)
        for sequence in live:
            sequence.done += length
    assert executor.num_captured
    assert executor.num_replayed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_decode_iteration_compiles() -> None:
    """PyTorch's compiler as the executor, on the CPU."""
    decoder, rng = decoder_of("llama"), random.Random(6)
    step, blocks = paged(decoder, torch.compile), Blocks(decoder, rng)
    live = [blocks.sequence(tokens(rng, decoder, 12), decoder.config.full_spec) for _ in range(2)]
    for length in (7, 1, 1, 1):
        for sequence, hidden in zip(live, run(step, live, [length] * 2), strict=True):
            # rotations are rounded to float32
            assert error(hidden, reference(decoder, sequence, length)) < 1e-6
            sequence.done += length
