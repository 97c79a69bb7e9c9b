"""Tensors of a GGUF file, by llama.cpp's names and in its layout; made one at a time while the file is written.

What its converter rearranges, and `flextron.gguf.checkpoint` puts back, is rearranged here: the rows of
each query and key head where neighbouring dimensions are rotated together, by each layer's own number of heads; linears
that lie as (in, out); queries, keys and values in one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import gguf
import numpy as np
import torch
from torch import Tensor

from flextron.checkpoints.weights import stock_maps
from flextron.export.gguf.architectures import Architecture
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder

__all__ = ["FileTensor", "file_tensors"]

_QKV = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileTensor:
    """A tensor that is computed when it is asked for."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first."""
    values: Callable[[], Tensor]
    """Its numbers."""


@torch.no_grad()
def file_tensors(decoder: Decoder, architecture: Architecture) -> Iterator[FileTensor]:
    """All tensors of the file, in its order.

    Args:
        decoder: as wide as the file says.
        architecture: how it is written.
    """
    config, parameters = decoder.config, dict(decoder.named_parameters())
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, len(decoder.widths.kept_layers))
    for hf_name, tensor_map in stock_maps(decoder, parameters):
        parts = [_Part(p, parameters[p].detach(), tensor_map.contracts) for p in tensor_map.ours]
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if len(parts) > 1 and not architecture.is_fused:
            for part in parts:
                yield _file_tensor(_own_name(hf_name, part.letter), [part], config, architecture)
            continue
        if architecture.is_fused and parts[0].letter in _QKV and len(parts) == 1:
            # one map for each of them here, one tensor there: q calls the others, which then are silent
            if parts[0].letter != "q":
                continue
            parts = [_of(parameters, parts[0], letter) for letter in _QKV]
            name = _fused_name(hf_name)
        assert name is not None, hf_name
        yield _file_tensor(name, parts, config, architecture)
    yield from _missing_biases(decoder, architecture)
    if architecture.needs_head and config.tie_word_embeddings:
        weight = decoder.embedding.weight.detach()
        yield FileTensor(name="output.weight", shape=tuple(weight.shape), values=lambda: weight)
    for name, factors in _frequency_factors(config).items():
        yield FileTensor(name=name, shape=tuple(factors.shape), values=partial(torch.clone, factors))


@dataclass(frozen=True, slots=True)
class _Part:
    """A parameter of the decoder that becomes a tensor of the file, or some rows of one."""

    name: str
    value: Tensor
    contracts: bool

    @property
    def letter(self) -> str:
        """Name of its module."""
        return self.name.split(".")[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as (out, in)."""
        return tuple(reversed(self.value.shape)) if self._is_turned else tuple(self.value.shape)

    @property
    def _is_turned(self) -> bool:
        return self.contracts and self.value.dim() == 2

    def rows(self, architecture: Architecture, config: DecoderConfig) -> Tensor:
        """Its numbers as (out, in), in the file's order of rows; gains of norms with what the model adds to them."""
        rows = self.value.t() if self._is_turned else self.value
        if architecture.is_interleaved and self.letter in ("q", "k"):
            rows = _neighbouring_pairs(rows, config.head_dim)
        return rows + config.norm_offset if config.norm_offset and self.letter.endswith("norm") else rows


def _of(parameters: dict[str, torch.nn.Parameter], part: _Part, letter: str) -> _Part:
    """The same kind of parameter of another module of the attention."""
    name = part.name.replace(".q.", f".{letter}.")
    return _Part(name, parameters[name].detach(), part.contracts)


def _own_name(hf_name: str, letter: str) -> str:
    """The name of a linear that a checkpoint of the family fuses with others."""
    layer, kind = hf_name.split(".")[2], hf_name.rsplit(".", 1)[-1]
    return f"blk.{layer}.{'attn' if letter in _QKV else 'ffn'}_{letter}.{kind}"


def _fused_name(hf_name: str) -> str:
    layer, kind = hf_name.split(".")[2], hf_name.rsplit(".", 1)[-1]
    return f"blk.{layer}.attn_qkv.{kind}"


def _file_tensor(name: str, parts: Sequence[_Part], config: DecoderConfig, architecture: Architecture) -> FileTensor:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return FileTensor(
        name=name,
        shape=shape,
        values=lambda: torch.cat([part.rows(architecture, config) for part in parts]).contiguous(),
    )


def _neighbouring_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Interleave each head's rows: row i and row i + head_dim / 2, which rotate together, become neighbours."""
    by_half: Tensor = rows.unflatten(0, (-1, 2, head_dim // 2))
    return by_half.transpose(1, 2).flatten(0, 2)


def _missing_biases(decoder: Decoder, architecture: Architecture) -> Iterator[FileTensor]:
    """Zeros for biases that the architecture asks for and the model has not."""
    config = decoder.config
    if not architecture.needs_attention_biases or config.qkv_bias:
        return
    for i in range(len(decoder.widths.kept_layers)):
        for name, size in (("attn_qkv", 3 * config.hidden_size), ("attn_output", config.hidden_size)):
            yield FileTensor(name=f"blk.{i}.{name}.bias", shape=(size,), values=partial(torch.zeros, size))


def _frequency_factors(config: DecoderConfig) -> dict[str, Tensor]:
    """What each rotary frequency is divided by, (rotated / 2,), by name of tensor; none where they are left alone.

    Llama 3: waves that turn at least `high_freq_factor` times in the original context are left alone, those that turn
    less than `low_freq_factor` times are stretched by the whole factor, and between them the share of either moves
    linearly. Phi-3: numbers for short and for long texts.
    """
    scaling = None if config.rope is None else config.rope.scaling
    if config.rope is None or scaling is None or scaling["rope_type"] not in ("llama3", "longrope"):
        return {}
    if scaling["rope_type"] == "longrope":
        both = {length: torch.tensor(scaling[f"{length}_factor"]) for length in ("short", "long")}
        return {f"rope_factors_{length}.weight": factors for length, factors in both.items()}
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    turns = scaling["original_max_position_embeddings"] * config.rope.theta**-exponents / (2 * math.pi)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": torch.from_numpy((1 / (kept + (1 - kept) / factor)).astype(np.float32))}
