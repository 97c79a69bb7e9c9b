"""Tiny decoders with random weights, and a reference for what the engine must answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from unittest import mock

import torch
from torch import Tensor

from flextron.families.config import config_from_hf
from flextron.kernels.decoder import Weights
from flextron.kernels.quantization import GROUP, column_scales, quantize_groups, quantize_rows
from flextron.model import nested
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.model.nested import Block
from flextron.spec import LayerSpec, SubnetSpec
from tests.checkpoints.families_cases import CASES


def random_decoder(name: str) -> Decoder:
    """A frozen decoder of one of the family cases."""
    torch.manual_seed(0)
    decoder = Decoder(config_from_hf(CASES[name].to_dict())).eval().requires_grad_(False)
    for p in decoder.parameters():
        p.normal_(0, 0.3) if p.dim() > 1 else p.normal_(1, 0.3)
    return decoder


def ragged_specs(config: DecoderConfig, count: int) -> list[SubnetSpec]:
    """Heterogeneous sub-networks that also skip halves of layers, and the full one."""
    rng = random.Random(0)

    def layer() -> LayerSpec:
        return LayerSpec(
            intermediate_size=rng.choice([0, 5, config.intermediate_size]),
            num_groups=rng.choice([0, 1, config.num_groups]),
        )

    drawn = [SubnetSpec(layers=tuple(layer() for _ in range(config.num_hidden_layers))) for _ in range(count - 1)]
    return [*drawn, config.full_spec]


def rounded(matrix: Tensor, weights: Weights) -> Tensor:
    """The numbers that stand for a matrix."""
    if weights == "int8":
        rows, scales = quantize_rows(matrix)
        return rows * scales[:, None]
    numbers, scales = quantize_groups(matrix)
    return numbers * scales.float().repeat_interleave(GROUP, 1)


def rounded_decoder(decoder: Decoder, weights: Weights) -> Decoder:
    """A copy with those; embeddings are looked up as they are, and a head of its own is in eight bits."""
    copy = deepcopy(decoder)
    for name, matrix in copy.layers.named_parameters():
        if matrix.dim() == 2:
            if name.endswith((".o.weight", ".down.weight")):
                columns = column_scales(matrix)
                matrix.copy_(columns * rounded(matrix / columns, "int8"))
            else:
                matrix.copy_(rounded(matrix, weights))
    if copy.head_weight is not copy.embedding.weight:
        copy.head_weight.copy_(rounded(copy.head_weight, "int8"))
    return copy


def rounded_tokens(x_NK: Tensor) -> Tensor:
    """Multiples of a scale for each token: 127 of them reach its largest number, or four root mean squares if less."""
    x = x_NK.double()
    reach = torch.minimum(x.abs().amax(-1, keepdim=True), 4 * x.square().mean(-1, keepdim=True).sqrt())
    scale = reach.clamp_min(1e-30) / 127
    return ((x / scale).round() * scale).to(x_NK.dtype)


@contextmanager
def whole_number_products(decoder: Decoder, reference: Decoder, weights: Weights) -> Iterator[None]:
    """Inside, matrices of eight bits in `reference`, the rounded copy of `decoder`, meet rounded tokens.

    Rows that are inputs give their scales to the tokens before these are rounded.
    """
    scales: dict[int, Tensor] = {}
    own = dict(decoder.layers.named_parameters())
    for name, matrix in reference.layers.named_parameters():
        if name.endswith((".o.weight", ".down.weight")):
            scales[matrix.data_ptr()] = quantize_rows(own[name] / column_scales(own[name]))[1]
    expand, contract = nested.expand_blocks, nested.contract_blocks

    def expand_rounded(x: Tensor, w: Tensor, b: Tensor | None, blocks: tuple[Block, ...]) -> tuple[Tensor, ...]:
        if weights == "int4":  # these matrices meet 16 bits in groups of their own
            groups = x.view(len(x), -1, GROUP)
            step = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 32767
            return expand(((groups / step).round() * step).view_as(x), w, b, blocks)
        return expand(rounded_tokens(x), w, b, blocks)

    def contract_rounded(
        num_tokens: int, w: Tensor, b: Tensor | None, blocks: tuple[Block, ...], h: Sequence[Tensor]
    ) -> Tensor:
        rows = scales[w.data_ptr()]
        parts = [part.clone() for part in h]
        for i in range(blocks[0].num_tokens):  # a token is in as many blocks as it is wide
            mine = [(part, block) for part, block in zip(parts, blocks, strict=True) if i < block.num_tokens]
            ends = [block.stop for _, block in mine]
            token = rounded_tokens(torch.cat([part[i] for part, _ in mine]) * rows[: ends[-1]]) / rows[: ends[-1]]
            for part, block in mine:
                part[i] = token[block.start : block.stop]
        return contract(num_tokens, w, b, blocks, parts)

    with mock.patch.multiple(nested, expand_blocks=expand_rounded, contract_blocks=contract_rounded):
        yield
