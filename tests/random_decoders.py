"""Tiny decoders with random weights, and a reference for what the engine must answer."""

from __future__ import annotations

import random
from copy import deepcopy

import torch
from torch import Tensor

from flextron.families.config import config_from_hf
from flextron.kernels.decoder import Weights
from flextron.kernels.quantization import GROUP, column_scales, quantize_groups, quantize_rows
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
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
