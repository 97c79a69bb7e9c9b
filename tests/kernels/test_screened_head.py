"""The likeliest token by an eight-bit copy of the head, against the whole head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from flextron import SamplingParams
from flextron.engine import EngineCore, EngineSettings
from flextron.families.config import config_from_hf
from flextron.kernels.decoder import NativeStep
from flextron.kernels.quantization import quantize_rows, row_errors
from flextron.model.decoder import Decoder
from tests.kernels.test_decoder import compiled
from tests.trained import trained_model

PAGE = 8


def decoder_with_head(head_VD: Tensor) -> Decoder:
    """A decoder of one layer with an untied head."""
    vocab_size, hidden_size = head_VD.shape
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    torch.manual_seed(1)
    decoder = Decoder(config_from_hf(LlamaConfig(**sizes, **heads).to_dict())).eval().requires_grad_(False)
    decoder.head.weight.copy_(head_VD)
    return decoder


def logits(decoder: Decoder, num_rows: int, num_full: int) -> Tensor:
    """Logits of one sequence after each token."""
    config = decoder.config
    units = config.num_groups
    table = torch.arange(-(-num_rows // PAGE) * units, dtype=torch.int32).view(-1, units)
    widths = torch.full((1, num_rows), config.intermediate_size, dtype=torch.int32)
    return NativeStep(decoder, PAGE, screens_head=True)(
        torch.arange(num_rows) % config.vocab_size,
        torch.arange(num_rows),
        widths,
        torch.full((1, num_rows), config.num_groups, dtype=torch.int32),
        [table] * num_rows,
        torch.zeros(1, num_rows, dtype=torch.int32),
        torch.zeros(table.numel(), 2, PAGE, config.head_dim),
        range(num_rows),
        num_full=num_full,
    )


@compiled
@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, 12])
@pytest.mark.parametrize("num_full", [0, 1, 5])
def test_the_largest_logit_is_the_exact_one(num_rows: int, num_full: int) -> None:
    torch.manual_seed(0)
    head = torch.randn(301, 32)
    head[:, 3] *= 40  # an outlier column takes the steps of the scales
    head[200:] = head[100] + 1e-4 * torch.randn(101, 32)  # many that eight bits cannot tell apart
    num_full = min(num_full, num_rows)
    decoder = decoder_with_head(head)
    exact, got = logits(decoder, num_rows, num_rows), logits(decoder, num_rows, num_full)
    torch.testing.assert_close(got[:num_full], exact[:num_full], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.amax(1), exact.amax(1), rtol=1e-5, atol=1e-5)
    chosen = exact.gather(1, got.argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(chosen, exact.amax(1), rtol=1e-5, atol=1e-5)
    known = got.isfinite()
    torch.testing.assert_close(got[known], exact[known], rtol=1e-5, atol=1e-5)
    if num_rows - num_full in range(1, 9):
        assert float(known[num_full:].float().mean()) < 0.8  # most of the head was not read


@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    rows=st.integers(1, 40),
    columns=st.sampled_from([8, 96]),
)
def test_products_with_quantized_rows_are_within_the_errors(seed: int, scale: float, rows: int, columns: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * scale * torch.rand(columns).exp2().pow(8)
    numbers, scales = quantize_rows(weight)
    rounded = numbers.double() * scales.double()[:, None]
    # the worst input for each row is the difference itself
    difference = weight.double() - rounded
    inputs = difference / difference.norm(dim=1, keepdim=True).clamp_min(1e-300)
    assert ((difference * inputs).sum(1) <= row_errors(weight, numbers, scales).double()).all()


@compiled
def test_greedy_answers_are_the_same_beside_sampled_ones() -> None:
    model = trained_model()
    greedy = SamplingParams(max_tokens=20)
    kinds = [greedy, SamplingParams(max_tokens=20, temperature=1.0, seed=3), SamplingParams(max_tokens=20, logprobs=2)]

    def answers(screens: bool) -> list[list[int]]:
        core = EngineCore(model.decoder, EngineSettings(screens_head=screens, native=True))
        network = core.network(model.space.full)
        requests = [core.add(f"{i}", [1 + i, 2, 3], kinds[i % 3], network) for i in range(7)]
        while core.has_unfinished:
            core.step()
        return [request.answer for request in requests]

    assert answers(True) == answers(False)
