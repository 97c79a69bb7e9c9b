"""Weights of four bits: how far off they are, and that sub-networks have the numbers of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flextron.kernels.quantization import GROUP, pack_groups, quantize_groups, quantize_rows


def drawn(seed: int, rows: int, columns: int, size: float) -> Tensor:
    """Numbers with a few much larger ones among them."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return size * normal * torch.where(torch.rand(rows, columns, generator=generator) < 0.02, 10, 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 70),
    groups=st.integers(1, 5),
    size=st.sampled_from([1e-20, 1e-6, 0.02, 1.0, 1e6]),
)
def test_errors_are_at_most_those_of_q4_0(seed: int, rows: int, groups: int, size: float) -> None:
    """llama.cpp's Q4_0 divides by an eighth of the number of largest magnitude; and scales are rounded to bfloat16."""
    weight = drawn(seed, rows, GROUP * groups, size)
    numbers, scales = quantize_groups(weight)
    assert numbers.min() >= -8
    assert numbers.max() <= 7
    errors = (numbers * scales.float().repeat_interleave(GROUP, 1) - weight).view(-1, GROUP) / size
    parts = weight.view(-1, GROUP) / size
    step = parts.gather(1, parts.abs().argmax(1, keepdim=True)) / -8
    simple = step * (parts / step).round().clamp(-8, 7) - parts
    assert (errors.square().sum(1) <= simple.square().sum(1) * 1.001 + parts.square().sum(1) * 2**-15).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(2, 5000), prefix=st.floats(0, 1))
def test_a_prefix_has_the_numbers_of_the_whole(seed: int, rows: int, prefix: float) -> None:
    weight = drawn(seed, rows, 2 * GROUP, 0.1)
    count = max(1, int(prefix * rows))
    (numbers, scales), (own, own_scales) = quantize_groups(weight), quantize_groups(weight[:count])
    assert torch.equal(numbers[:count], own)
    assert torch.equal(scales[:count], own_scales)
    assert torch.equal(pack_groups(numbers)[:count], pack_groups(own))


def test_zeros_stay_zeros() -> None:
    numbers, scales = quantize_groups(torch.zeros(3, GROUP))
    assert not (numbers * scales.float()).any()


@pytest.mark.parametrize("size", [0.02, 3.0])
def test_eight_bits_are_half_a_step_off_at_most(size: float) -> None:
    weight = drawn(0, 40, 56, size)
    numbers, scales = quantize_rows(weight)
    assert ((numbers * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()


def test_four_bits_take_the_bytes_that_the_guide_says() -> None:
    numbers, scales = quantize_groups(drawn(0, 64, 576, 0.1))
    assert (pack_groups(numbers).nbytes + scales.nbytes) / numbers.numel() == 0.5625
