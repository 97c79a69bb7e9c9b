"""What shares a batch does not matter: each sequence's hidden states and gradients are those it has alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flextron.model.batch import Batch, Segment
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import MECHANISMS, random_decoder_of, random_tokens, relative_error

LENGTHS = (7, 3, 7, 11, 1, 5)


def mixed_specs(num_groups: int) -> list[SubnetSpec]:
    """Neighbours of equal spec, skipped halves, a skipped layer, and widths that cross from layer to layer."""
    return [
        SubnetSpec.of([40, 40, 40], [num_groups] * 3),
        SubnetSpec.of([8, 24, 40], [num_groups, 1, num_groups]),
        SubnetSpec.of([8, 24, 40], [num_groups, 1, num_groups]),
        SubnetSpec.of([0, 40, 16], [1, 0, num_groups]),
        SubnetSpec.of([24, 0, 8], [1, 0, 1]),
        SubnetSpec.of([40, 8, 0], [0, num_groups, 1]),
    ]


def sequences() -> list[Tensor]:
    return [random_tokens(n, seed=n + 10 * i) for i, n in enumerate(LENGTHS)]


@pytest.mark.parametrize("case", MECHANISMS)
def test_ragged_batch_of_mixed_specs_equals_each_sequence_alone(case: str) -> None:
    decoder = random_decoder_of(case)
    specs = mixed_specs(decoder.config.num_groups)
    with torch.no_grad():
        together = decoder(Batch.ragged(sequences(), specs)).split(LENGTHS)
        for tokens, spec, hidden in zip(sequences(), specs, together, strict=True):
            assert relative_error(hidden, decoder(Batch.padded(tokens[None], spec))) <= 1e-5


@pytest.mark.parametrize("case", ["llama-3", "llama-mqa", "qwen3", "gpt2", "neox"])
def test_gradients_of_a_mixed_batch_are_the_sum_of_those_alone(case: str) -> None:
    decoder = random_decoder_of(case).double()
    specs = mixed_specs(decoder.config.num_groups)
    directions = [d.double() for d in random_directions(decoder.config.hidden_size)]
    (decoder(Batch.ragged(sequences(), specs)) * torch.cat(directions)).sum().backward()
    together = {name: p.grad for name, p in decoder.named_parameters()}
    decoder.zero_grad()
    for tokens, spec, direction in zip(sequences(), specs, directions, strict=True):
        (decoder(Batch.ragged([tokens], [spec])) * direction).sum().backward()
    for name, parameter in decoder.named_parameters():
        if parameter.grad is None:  # the head, which hidden states do not use
            assert together[name] is None
            continue
        gradient = together[name]
        assert gradient is not None
        # GPT-2's key biases shift all scores of a query alike: their gradient is 0 but for rounding
        nothing = decoder.config.rope is None and name.endswith("attention.k.bias")
        assert relative_error(gradient, parameter.grad) <= 1e-12 or (nothing and gradient.abs().max() < 1e-12), name


def random_directions(hidden_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, hidden_size, generator=generator) for n in LENGTHS]


@pytest.mark.parametrize("case", ["llama", "mistral", "gpt2"])
def test_padded_equals_ragged_and_padding_on_the_right_is_harmless(case: str) -> None:
    decoder = random_decoder_of(case)
    tokens, spec = random_tokens(3, 9), SubnetSpec.of([40, 16, 8], [1, 2, 1])
    with torch.no_grad():
        padded = decoder(Batch.padded(tokens, spec))
        ragged = decoder(Batch.ragged(list(tokens), [spec] * 3))
        short = decoder(Batch.ragged([t[:5] for t in tokens], [spec] * 3))
    assert relative_error(ragged, padded) <= 1e-5
    assert relative_error(short, padded.unflatten(0, (3, 9))[:, :5].flatten(0, 1)) <= 1e-5


def test_segments_join_neighbours_of_equal_spec_and_positions_start_where_told() -> None:
    wide, narrow = SubnetSpec.of([4], [2]), SubnetSpec.of([2], [1])
    tokens = [torch.arange(n) for n in (2, 3, 1, 2)]
    batch = Batch.ragged(tokens, [wide, wide, narrow, wide], starts=[0, 5, 9, 1])
    assert [(s.spec, s.lengths, s.num_tokens) for s in batch.segments] == [
        (wide, (2, 3), 5),
        (narrow, (1,), 1),
        (wide, (2,), 2),
    ]
    assert batch.positions_N.tolist() == [0, 1, 5, 6, 7, 9, 1, 2]
    assert batch.tokens_N.tolist() == [0, 1, 0, 1, 2, 0, 0, 1]


def test_gates_scale_what_each_half_layer_adds_and_take_gradients() -> None:
    decoder = random_decoder_of("llama")
    plain = Batch.padded(random_tokens(6, seed=0).repeat(2, 1), decoder.widths)
    gates = torch.ones(len(decoder.layers), 2, requires_grad=True)

    def run(second: Tensor | None) -> Tensor:
        segments = (Segment(decoder.widths, (6,)), Segment(decoder.widths, (6,), second))
        return decoder(Batch(plain.tokens_N, plain.positions_N, segments))[6:]

    assert relative_error(run(gates), decoder(plain)[6:]) < 1e-6
    (gradient,) = torch.autograd.grad(run(gates).square().mean(), gates)
    step = torch.zeros_like(gates)
    step[1, 0] = 1e-2
    ends = [run((gates + s).detach()).square().mean() for s in (step, -step)]
    assert float(gradient[1, 0]) == pytest.approx(float((ends[0] - ends[1]).detach()) / 2e-2, rel=0.02)
