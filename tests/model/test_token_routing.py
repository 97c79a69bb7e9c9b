"""Widths per token against a dense model that runs each token's MLP alone, by plain slicing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flextron.errors import FlextronError
from flextron.generation.generate import SamplingParams, generate
from flextron.model.attention import CachedAttention, CausalAttention
from flextron.model.batch import Batch, Segment
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.model.layers import ACTIVATIONS, Layer
from flextron.model.nested import Layout
from flextron.model.rope import rotary_tables
from flextron.model.token_layout import TokenLayout
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import random_decoder_of, random_tokens, relative_error

CHOICES = torch.tensor([0, 8, 24, 40])
FAMILIES = ["llama", "llama-3", "llama-mqa", "gpt2", "neox"]


@dataclass(frozen=True)
class BySign:
    """Widths and, if asked, gates that depend on the hidden state alone, so that they are the same with a cache."""

    gated: bool = False

    def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        index = (x_ND[:, layer] > 0).long() + 2 * (x_ND[:, layer + 3] > 0).long()
        return CHOICES[index], x_ND[:, 7].sigmoid() if self.gated else None

    def check(self, config: DecoderConfig, spec: SubnetSpec) -> None:
        pass


@dataclass(frozen=True)
class Constant:
    """The same width for all tokens of a layer."""

    widths: tuple[int, ...]

    def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, None]:
        return torch.full((len(x_ND),), self.widths[layer]), None

    def check(self, config: DecoderConfig, spec: SubnetSpec) -> None:
        if len(spec.layers) != len(self.widths):
            raise FlextronError("another model")


def spec_of(decoder: Decoder) -> SubnetSpec:
    """Attention narrower in one layer, and a layer whose MLP the spec skips."""
    full = decoder.config.num_groups
    return SubnetSpec.of([24, 0, 40], [full, 1, full])


def dense_mlp(layer: Layer, x_D: Tensor, width: int, activation: str) -> Tensor:
    """One token through the first `width` neurons."""
    mlp = layer.mlp

    def rows(linear: torch.nn.Linear) -> Tensor:
        y = linear.weight[:width] @ x_D
        return y if linear.bias is None else y + linear.bias[:width]

    if width == 0:
        return torch.zeros_like(x_D)
    h = rows(mlp.up) if mlp.gate is None else rows(mlp.up) * ACTIVATIONS[activation](rows(mlp.gate))
    if mlp.gate is None:
        h = ACTIVATIONS[activation](h)
    y = h @ mlp.down.weight[:width]
    return y if mlp.down.bias is None else y + mlp.down.bias


def dense(decoder: Decoder, tokens_T: Tensor, spec: SubnetSpec, router: BySign) -> Tensor:
    """Final hidden states of one sequence, each token's MLP run by itself."""
    batch = Batch.padded(tokens_T[None], spec)
    x = decoder.embed(batch)
    ropes = rotary_tables(decoder.config, batch.positions_N, x.dtype)
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        before = x
        x = x + layer.attend(x, batch, [spec.layers[i].num_groups], i, ropes[i], CausalAttention(decoder.config))
        if spec.layers[i].intermediate_size:
            normed = layer.mlp_norm(before if layer.parallel else x)
            widths, gates = router(i, normed)
            outs = [dense_mlp(layer, t, int(w), decoder.config.activation) for t, w in zip(normed, widths, strict=True)]
            x = x + (torch.stack(outs) if gates is None else torch.stack(outs) * gates[:, None])
    out: Tensor = decoder.final_norm(x)
    return out


@given(st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=9), st.sampled_from([1, 16]))
def test_layout_of_tokens_equals_that_of_segments_of_one_token(widths: list[int], repeats: int) -> None:
    widths = widths * repeats  # few tokens, or many
    layout = TokenLayout.of(torch.tensor(widths))
    if not any(widths):
        assert layout.blocks == ()
        return
    expected = Layout.of((1,) * len(widths), tuple(widths))
    assert layout.blocks == expected.blocks
    x = torch.arange(2 * len(widths)).view(-1, 2)
    torch.testing.assert_close(layout.sort(x), expected.sort(x), rtol=0, atol=0)
    torch.testing.assert_close(layout.unsort(layout.sort(x)), x, rtol=0, atol=0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("case", FAMILIES)
def test_routed_tokens_equal_a_dense_pass_token_by_token(case: str, gated: bool) -> None:
    decoder = random_decoder_of(case).double()
    spec, router = spec_of(decoder), BySign(gated)
    tokens = random_tokens(2, 9)
    ours = decoder(Batch.padded(tokens, spec, router))
    reference = torch.cat([dense(decoder, t, spec, router) for t in tokens])
    # rotary tables are of float32 angles in both
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    direction = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = [p for name, p in decoder.named_parameters() if not name.startswith("head.")]
    mine = torch.autograd.grad(ours, parameters, direction, allow_unused=True)
    theirs = torch.autograd.grad(reference, parameters, direction, allow_unused=True)
    assert sum(g is not None for g in theirs) > len(parameters) / 2
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_the_router_above_really_mixes_widths() -> None:
    decoder = random_decoder_of("llama")
    seen: dict[int, set[int]] = {}

    class Watching(BySign):
        def __call__(self, layer: int, x_ND: Tensor) -> tuple[Tensor, Tensor | None]:
            widths, gates = super().__call__(layer, x_ND)
            seen.setdefault(layer, set()).update(widths.tolist())
            return widths, gates

    decoder(Batch.padded(random_tokens(6, 9), spec_of(decoder), Watching()))
    assert seen == {0: {0, 8, 24, 40}, 2: {0, 8, 24, 40}}  # and layer 1, which the spec skips, is not asked


@pytest.mark.parametrize("case", ["llama", "gpt2", "neox"])
def test_gradient_checkpointing_changes_nothing(case: str) -> None:
    decoder = random_decoder_of(case)
    batch = Batch.padded(random_tokens(2, 9), spec_of(decoder), BySign(gated=True))
    gradients = []
    for decoder.gradient_checkpointing in (False, True):
        decoder.zero_grad()
        decoder(batch).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("case", FAMILIES)
def test_static_and_routed_segments_in_one_batch_equal_each_alone(case: str) -> None:
    decoder = random_decoder_of(case)
    wide, narrow = decoder.widths, spec_of(decoder)
    gated = BySign(gated=True)
    lengths = (5, 1, 7, 3)
    tokens = [random_tokens(n, seed=n) for n in lengths]
    specs = [wide, narrow, narrow, narrow]
    routers = [None, BySign(), None, gated]
    with torch.no_grad():
        batch = Batch.ragged(tokens, specs, routers=routers)
        together = decoder(batch).split(lengths)
        for t, spec, router, hidden in zip(tokens, specs, routers, together, strict=True):
            assert relative_error(hidden, decoder(Batch.padded(t[None], spec, router))) <= 1e-5
    assert [s.router for s in batch.segments] == routers


def test_neighbours_share_a_segment_only_with_the_same_router() -> None:
    spec, router = SubnetSpec.of([8], [1]), Constant((8,))
    tokens = [torch.arange(n) for n in (1, 2, 3, 4)]
    batch = Batch.ragged(tokens, [spec] * 4, routers=[router, router, None, Constant((8,))])
    assert [s.lengths for s in batch.segments] == [(1, 2), (3,), (4,)]


@pytest.mark.parametrize("case", FAMILIES)
def test_equal_choices_for_all_tokens_are_the_static_subnetwork(case: str) -> None:
    decoder = random_decoder_of(case)
    spec = SubnetSpec.of([8, 24, 0], [1, 2, 1])
    around = SubnetSpec.of([40, 40, 40], [1, 2, 1])
    tokens = random_tokens(3, 8)
    with torch.no_grad():
        routed = decoder(Batch.padded(tokens, around, Constant((8, 24, 0))))
        assert torch.equal(routed, decoder(Batch.padded(tokens, spec)))
    assert mean_loss(decoder, tokens, around, Constant((8, 24, 0))) == mean_loss(decoder, tokens, spec)


@pytest.mark.parametrize("case", [*FAMILIES, "mistral"])
def test_decoding_with_a_cache_equals_one_pass(case: str) -> None:
    decoder = random_decoder_of(case)
    spec, router, prompt = spec_of(decoder), BySign(), 4
    tokens = [random_tokens(10, seed=i) for i in range(3)]
    routers = [router, router, None]
    with torch.inference_mode():
        whole = decoder(Batch.ragged(tokens, [spec] * 3, routers=routers)).unflatten(0, (3, 10))
        cache = CachedAttention(decoder.config, [(spec, 2), (spec, 1)], 10, dtype=decoder.dtype, device=decoder.device)
        steps = [slice(0, prompt), *(slice(i, i + 1) for i in range(prompt, 10))]
        for step in steps:
            batch = Batch.ragged([t[step] for t in tokens], [spec] * 3, [step.start] * 3, routers)
            hidden = decoder(batch, cache).unflatten(0, (3, -1))
            cache.advance([s.lengths for s in batch.segments])
            assert relative_error(hidden, whole[:, step]) <= 1e-5


def test_generation_of_several_prompts_equals_a_pass_over_the_whole_text_for_each_token() -> None:
    decoder = random_decoder_of("llama")
    spec, router = spec_of(decoder), BySign()
    prompts = [random_tokens(n, seed=i).tolist() for i, n in enumerate((4, 9, 1))]
    ours = generate(decoder, prompts, spec, SamplingParams(max_tokens=8), router)
    for prompt, answer in zip(prompts, ours, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                hidden = decoder(Batch.padded(torch.tensor([tokens]), spec, router))
            tokens.append(int(decoder.logits(hidden[-1:]).argmax()))
        assert answer == tokens[len(prompt) :]
    assert ours != generate(decoder, prompts, spec, SamplingParams(max_tokens=8))


@pytest.mark.parametrize(
    "use",
    [
        lambda d, s, r: generate(d, [[1]], s, SamplingParams(max_tokens=1), r),
        lambda d, s, r: mean_loss(d, random_tokens(1, 4), s, r),
    ],
)
def test_a_router_of_another_model_is_refused(use: Callable[[Decoder, SubnetSpec, Constant], object]) -> None:
    decoder = random_decoder_of("llama")
    with pytest.raises(FlextronError, match="another model"):
        use(decoder, decoder.widths, Constant((8,)))


def test_routed_segments_take_gates_of_whole_halves_too() -> None:
    decoder = random_decoder_of("llama")
    tokens = random_tokens(5)
    off = torch.tensor([[1.0, 0.0]] * 3)
    positions = torch.arange(5)
    with torch.no_grad():
        gated = decoder(Batch(tokens, positions, (Segment(decoder.widths, (5,), off, BySign()),)))
        without = decoder(Batch.padded(tokens[None], SubnetSpec.of([0, 0, 0], [2, 2, 2])))
    torch.testing.assert_close(gated, without)
