"""Gradients in chunks against plain autograd on whole sequences, in float64; what is kept; what is refused."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from flextron.errors import FlextronError
from flextron.finetuning.example import Example
from flextron.finetuning.layerwise import Finetuning
from flextron.finetuning.units import Stage
from flextron.model.adapter import TARGETS, Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import MECHANISMS, random_tokens
from tests.model.adapter_cases import random_ia3, random_lora, targets_of
from tests.random_decoders import ragged_specs, random_decoder

BAR = 1e-10


def examples_of(lengths: Sequence[int], seed: int = 0) -> list[Example]:
    """Texts whose first third is a prompt; the last one's weights are not all 1."""
    out = []
    for k, n in enumerate(lengths):
        weights = (torch.arange(n) > n // 3).double()
        out.append(Example(random_tokens(n, seed=seed + k), weights * (1 + 0.5 * (k == len(lengths) - 1))))
    return out


def plain(decoder: Decoder, adapter: Adapter, examples: Sequence[Example], spec: SubnetSpec) -> float:
    """Loss by the textbook; its gradients are added to the adapter's."""
    total = sum(float(e.mask[1:].sum()) for e in examples)
    loss = torch.zeros((), dtype=torch.float64)
    for e in examples:
        logits = decoder.logits(decoder(Batch.ragged([e.tokens], [spec], adapters=[adapter])))
        loss = loss + (F.cross_entropy(logits[:-1], e.tokens[1:], reduction="none") * e.mask[1:]).sum() / total
    loss.backward()
    return float(loss.detach())


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    """What was added up, by name; forgets it."""
    out = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in adapter.named_parameters()}
    adapter.zero_grad(set_to_none=True)
    return out


def run(work: Finetuning, forward: Sequence[int], backward: Sequence[int]) -> None:
    """Chunk sizes in turn, again and again; the head's are those of the forward pass."""
    k = 0
    while work.stage is not None:
        sizes = backward if work.stage is Stage.BACKWARD else forward
        assert 0 < work.run(sizes[k % len(sizes)]) <= sizes[k % len(sizes)]
        k += 1
    assert work.run(1) == 0


def check(
    decoder: Decoder,
    adapter: Adapter,
    lengths: Sequence[int],
    forward: Sequence[int],
    backward: Sequence[int],
    spec: SubnetSpec | None = None,
    keep: Collection[str] = (),
) -> None:
    examples = examples_of(lengths)
    loss = plain(decoder, adapter, examples, spec or decoder.widths)
    expected = gradients(adapter)
    work = Finetuning(decoder, adapter, examples, spec=spec, keep=keep)
    run(work, forward, backward)
    ours = gradients(adapter)
    assert work.num_left == 0
    assert work.saved.num_bytes == 0
    assert work.loss == pytest.approx(loss, rel=BAR)
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name, g in expected.items():
        scale = max(float(g.abs().max()), 1e-6 * largest)
        assert float((ours[name] - g).abs().max()) <= BAR * scale, name


def doubles(case: str, make: type = random_lora, **options: object) -> tuple[Decoder, Adapter]:
    decoder = random_decoder(case).double()
    return decoder, make(decoder.config, **options).double()


@pytest.mark.parametrize("case", MECHANISMS)
@pytest.mark.parametrize("make", [random_lora, random_ia3])
@pytest.mark.parametrize("keep", [(), ("q", "attention", "o", "gate", "up")], ids=["recomputed", "kept"])
def test_every_mechanism_and_method(case: str, make: type, keep: tuple[str, ...]) -> None:
    decoder, adapter = doubles(case, make)
    check(decoder, adapter, [13, 6, 9], [4, 7, 1], [5, 2], keep=keep)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", ["llama-3", "gemma3", "neox"])
def test_each_linear_alone(case: str, target: str) -> None:
    decoder = random_decoder(case).double()
    if target in targets_of(decoder.config):
        for adapter in (
            random_lora(decoder.config, targets=[target]),
            random_ia3(decoder.config, targets=[target]),
            random_ia3(decoder.config, targets=[target], input_targets=[target]),
        ):
            check(decoder, adapter.double(), [11, 7], [5], [3, 4])


SIZES = st.lists(st.integers(1, 16), min_size=1, max_size=6)


@settings(max_examples=40)
@given(
    case=st.sampled_from(MECHANISMS),
    targets=st.sets(st.sampled_from(TARGETS), min_size=1),
    lengths=st.lists(st.integers(5, 24), min_size=1, max_size=4),
    forward=SIZES,
    backward=SIZES,
    chosen=st.integers(0, 3),
    keep=st.sets(st.sampled_from(["q", "attention", "o", "gate", "up"])),
)
def test_any_cuts_of_any_examples_in_any_sub_network(
    case: str,
    targets: set[str],
    lengths: list[int],
    forward: list[int],
    backward: list[int],
    chosen: int,
    keep: set[str],
) -> None:
    decoder = random_decoder(case).double()
    present = targets & set(targets_of(decoder.config)) or {"q"}
    adapter = random_lora(decoder.config, targets=sorted(present)).double()
    spec = ragged_specs(decoder.config, 4)[chosen]
    if any(adapter.targets_in(i, spec.layers[i]) for i in range(len(spec.layers))):
        check(decoder, adapter, lengths, forward, backward, spec, keep)


def test_layers_below_the_lowest_bypass_cost_nothing() -> None:
    decoder = random_decoder("llama").double()
    adapter = random_lora(decoder.config).double()
    high = Adapter(
        decoder.config, decoder.widths, lambda i, t, _: adapter.at(i)[t] if i == 2 and t in ("q", "up") else None
    )
    check(decoder, high, [12, 9], [5], [4])
    work = Finetuning(decoder, high, examples_of([12, 9]))
    while work.stage is not Stage.BACKWARD:
        work.run(19)
    assert set(work.saved.keys) == {2}
    assert work.num_left == work.num_tokens == 19


def test_forward_order_without_deferral_would_be_wrong() -> None:
    """That the check can fail: gradients that leave out what later chunks send to earlier keys."""
    decoder, adapter = doubles("llama")
    examples = examples_of([14])
    run(Finetuning(decoder, adapter, examples), [5], [5])
    right = gradients(adapter)
    work = Finetuning(decoder, adapter, examples)
    while work.run(5):
        if work.stage is Stage.BACKWARD and work.saved.key_value_gradients is not None:
            for sums in work.saved.key_value_gradients:
                sums.zero_()
    wrong = gradients(adapter)
    assert max(float((wrong[n] - g).abs().max() / g.abs().max()) for n, g in right.items()) > 1e-3


def test_inference_between_units_changes_nothing_and_gradients_accumulate() -> None:
    decoder, adapter = doubles("qwen2")
    first, second = examples_of([12]), examples_of([9, 7], seed=5)
    plain(decoder, adapter, first + second, decoder.widths)
    expected = gradients(adapter)
    total = sum(float(e.mask[1:].sum()) for e in first + second)
    works = [Finetuning(decoder, adapter, e, total_weight=total) for e in (first, second)]
    other = random_lora(decoder.config, 2, 7).double()
    busy = True
    while busy:  # two passes and inference, turn about
        busy = sum(w.run(3) for w in works) > 0
        with torch.inference_mode():
            decoder(Batch.ragged([random_tokens(5)], [decoder.widths], adapters=[other]))
    ours = gradients(adapter)
    for name, g in expected.items():
        assert float((ours[name] - g).abs().max()) <= BAR * float(g.abs().max()), name


def live_bytes() -> int:
    """Bytes of all tensors that the garbage collector knows of."""
    gc.collect()
    storages = {}
    for t in gc.get_objects():
        if type(t) is Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Hide what lives already from the garbage collector: to look through all of it after each unit takes minutes."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("keep", [(), ("q", "up"), ("attention",)])
def test_what_is_counted_is_all_that_is_kept(keep: tuple[str, ...]) -> None:
    decoder, adapter = doubles("llama")
    work = Finetuning(decoder, adapter, examples_of([60, 50]), keep=keep)
    before = live_bytes()
    assert before > 0
    while work.run(50):
        gradients(adapter)
        assert live_bytes() - before == work.saved.num_bytes
    assert work.saved.num_bytes == 0


def test_bad_use_is_refused() -> None:
    decoder, adapter = doubles("gpt2")
    tokens, ones = random_tokens(70), torch.ones(70)
    with pytest.raises(FlextronError, match="at least two tokens"):
        Finetuning(decoder, adapter, [Example(tokens[:1], ones[:1])])
    with pytest.raises(FlextronError, match="one weight for each"):
        Finetuning(decoder, adapter, [Example(tokens[:9], ones[:8])])
    with pytest.raises(FlextronError, match="no token of the examples has a weight"):
        Finetuning(decoder, adapter, [Example(tokens[:9], ones[:9] * 0)])
    with pytest.raises(FlextronError, match="no token of the examples has a weight"):
        Finetuning(decoder, adapter, [])
    with pytest.raises(FlextronError, match="64 learned positions"):
        Finetuning(decoder, adapter, [Example(tokens, ones)])
    narrow = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=8, num_groups=1)
    with pytest.raises(FlextronError, match="narrower sub-network"):
        Finetuning(decoder, adapter.narrowed(narrow), examples_of([9]))
    no_mlp = SubnetSpec.of([0] * 3, [4] * 3)
    with pytest.raises(FlextronError, match="nothing could be trained"):
        Finetuning(decoder, random_lora(decoder.config, targets=["up"]), examples_of([9]), spec=no_mlp)
    with pytest.raises(FlextronError, match=r"attention, gate, o, q, up can be kept, not \['v'\]"):
        Finetuning(decoder, adapter, examples_of([9]), keep=["v"])
    work = Finetuning(decoder, adapter, examples_of([9]))
    work.run(3)
    with torch.no_grad():
        next(adapter.parameters()).mul_(2)
    with pytest.raises(FlextronError, match="has changed"):
        work.run(3)


def test_a_model_in_bfloat16_trains_an_adapter_in_float32() -> None:
    decoder = random_decoder("llama").to(torch.bfloat16)
    adapter = random_lora(decoder.config)
    run(Finetuning(decoder, adapter, examples_of([30, 20])), [16], [16])
    ours = gradients(adapter)
    reference = random_decoder("llama").double()
    plain(reference, adapter.double(), examples_of([30, 20]), reference.widths)
    for name, g in gradients(adapter).items():
        cosine = F.cosine_similarity(ours[name].double().flatten(), g.flatten(), dim=0)
        assert float(cosine) > 0.9, name


@pytest.mark.parametrize("case", MECHANISMS)
def test_the_forward_pass_alone(case: str) -> None:
    decoder, adapter = doubles(case)
    examples = examples_of([13, 6, 9])
    whole = Finetuning(decoder, adapter, examples)
    run(whole, [7], [7])
    loss = plain(decoder, adapter, examples, decoder.widths)
    gradients(adapter)
    for sizes in ([1000], [4, 7, 1]):
        work = Finetuning(decoder, adapter, examples, backward=False)
        stages = []
        while work.stage is not None:
            stages.append(work.stage)
            work.run(sizes[len(stages) % len(sizes)])
        assert set(stages) == {Stage.FORWARD, Stage.HEAD}
        assert work.loss == pytest.approx(loss, rel=BAR)
        assert (work.num_right, work.num_weighted) == (whole.num_right, whole.num_weighted)
        assert work.saved.num_bytes == 0
        assert all(p.grad is None for p in adapter.parameters())
