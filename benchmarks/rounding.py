"""What weights of few bits cost in perplexity, by the decoder with the numbers that the compiled iteration reads."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import smollm2
from flextron.kernels.decoder import NativeStep, Weights
from flextron.kernels.quantization import GROUP, column_scales, quantize_groups, quantize_rows
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder

__all__ = ["compiled_perplexity", "perplexity", "round_matrices", "rounded_head"]


@torch.inference_mode()
def perplexity(decoder: Decoder, weights: Weights, num_tokens: int = 4096) -> float:
    """Of held-out text, in sequences of 256 tokens, with the full network."""
    head, model = decoder.head_weight, decoder
    if weights != "float32":
        model, head = deepcopy(decoder), rounded_head(decoder)
        round_matrices(model, weights)
    losses = [_losses(model, head, tokens) for tokens in smollm2.eval_sequences(num_tokens)]
    return math.exp(float(torch.cat(losses).mean()))


@torch.inference_mode()
def compiled_perplexity(decoder: Decoder, weights: Weights, num_tokens: int = 4096) -> float:
    """The same by the compiled iteration, which rounds what eight-bit matrices are multiplied with, too."""
    native = NativeStep(decoder, _PAGE, weights)
    losses = []
    for tokens in smollm2.eval_sequences(num_tokens):
        losses.append(cross_entropy(_logits(native, decoder, tokens)[:-1], tokens[1:], reduction="none"))
    return math.exp(float(torch.cat(losses).mean()))


_PAGE = 16


def _logits(native: NativeStep, decoder: Decoder, tokens_T: Tensor) -> Tensor:
    """Scores after each token of a sequence, in one iteration; (T, vocabulary)."""
    config, length = decoder.config, len(tokens_T)
    heads = config.kv_rows(config.num_groups) // config.head_dim
    layers = torch.arange(config.num_hidden_layers, dtype=torch.int32)[:, None].expand(-1, length)
    blocks = heads * config.num_hidden_layers
    table = torch.arange(-(-length // _PAGE) * blocks, dtype=torch.int32).view(-1, blocks)
    return native(
        tokens_T,
        torch.arange(length),
        torch.full_like(layers, config.intermediate_size).contiguous(),
        torch.full_like(layers, config.num_groups).contiguous(),
        [table] * length,
        (layers * heads).contiguous(),
        torch.zeros(table.numel(), 2, _PAGE, config.head_dim),
        range(length),
    )


@torch.no_grad()
def round_matrices(decoder: Decoder, weights: Weights) -> None:
    """Round the layers' matrices in place; biases and norms stay as they are, in the compiled iteration, too."""
    for name, matrix in decoder.layers.named_parameters():
        if matrix.dim() == 2:
            if name.endswith((".o.weight", ".down.weight")):
                columns = column_scales(matrix)
                matrix.copy_(columns * _rounded(matrix / columns, "int8"))
            else:
                matrix.copy_(_rounded(matrix, weights))


@torch.no_grad()
def rounded_head(decoder: Decoder) -> Tensor:
    """The head in eight bits, which `int8` and `int4` have alike; (vocabulary, hidden size)."""
    return _rounded(decoder.head_weight, "int8")


def _losses(decoder: Decoder, head: Tensor, tokens_T: Tensor) -> Tensor:
    hidden_TD = decoder(Batch.ragged([tokens_T], [decoder.config.full_spec]))
    return cross_entropy((hidden_TD @ head.t())[:-1], tokens_T[1:], reduction="none")


def _rounded(matrix: Tensor, weights: Weights) -> Tensor:
    if weights == "int8":
        numbers, scales = quantize_rows(matrix)
        return numbers * scales[:, None]
    numbers, scales = quantize_groups(matrix)
    return numbers * scales.float().repeat_interleave(GROUP, 1)
