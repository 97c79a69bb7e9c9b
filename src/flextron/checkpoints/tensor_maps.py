"""Hugging Face's tensor names, as data: where each tensor goes, and how fused ones come apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GPT2_MAPS", "LLAMA_MAPS", "LLAMA_QK_NORM", "NEOX_MAPS", "TensorMap"]


@dataclass(frozen=True, slots=True)
class TensorMap:
    """One Hugging Face tensor and the parameter, or several fused ones, that it holds here."""

    hf: str
    """Name in the checkpoint, `{i}` standing for the layer."""
    ours: tuple[str, ...]
    """Names of the decoder's parameters that it holds, stacked by rows in this order."""
    transposed: bool = False
    """Whether it is stored as (in, out), as GPT-2's Conv1D is."""
    contracts: bool = False
    """Whether ours is (in, out): projections out of a nested dimension keep that dimension first, see `nested`."""
    per_head: bool = False
    """Whether the fused parts alternate head by head (GPT-NeoX) rather than lie one after the other."""

    @property
    def is_turned(self) -> bool:
        """Whether the checkpoint's matrix is the transpose of ours."""
        return self.transposed != self.contracts

    def split(self, tensor: Tensor, head_dim: int) -> tuple[Tensor, ...]:
        """Split the checkpoint's tensor into one (rows, ...) tensor for each of `ours`."""
        rows = tensor.t() if self.is_turned and tensor.dim() == 2 else tensor
        if len(self.ours) == 1:
            return (rows,)
        if not self.per_head:
            return rows.chunk(len(self.ours))
        by_head = rows.unflatten(0, (-1, len(self.ours), head_dim))
        return tuple(by_head[:, j].flatten(0, 1) for j in range(len(self.ours)))

    def join(self, parts: Sequence[Tensor], head_dim: int) -> Tensor:
        """The inverse of `split`."""
        if len(parts) == 1:
            rows = parts[0]
        elif self.per_head:
            rows = torch.stack([p.unflatten(0, (-1, head_dim)) for p in parts], dim=1).flatten(0, 2)
        else:
            rows = torch.cat(list(parts))
        return (rows.t() if self.is_turned and rows.dim() == 2 else rows).contiguous()


def _with_biases(maps: Sequence[TensorMap], bases: Sequence[str]) -> tuple[TensorMap, ...]:
    """Each map of a weight, followed by its twin for the bias where the base name is in `bases`."""
    out: list[TensorMap] = []
    for m in maps:
        out.append(m)
        if m.hf.removesuffix(".weight").rsplit(".", 1)[-1] in bases:
            ours = tuple(name.removesuffix("weight") + "bias" for name in m.ours)
            out.append(TensorMap(m.hf.removesuffix("weight") + "bias", ours, m.transposed, per_head=m.per_head))
    return tuple(out)


_L = "layers.{i}."
_LLAMA_LAYER = (
    *(TensorMap(f"model.{_L}self_attn.{x}_proj.weight", (f"{_L}attention.{x}.weight",)) for x in "qkv"),
    TensorMap(f"model.{_L}self_attn.o_proj.weight", (f"{_L}attention.o.weight",), contracts=True),
    *(TensorMap(f"model.{_L}mlp.{x}_proj.weight", (f"{_L}mlp.{x}.weight",)) for x in ("gate", "up")),
    TensorMap(f"model.{_L}mlp.down_proj.weight", (f"{_L}mlp.down.weight",), contracts=True),
    TensorMap(f"model.{_L}input_layernorm.weight", (f"{_L}attention_norm.weight",)),
    TensorMap(f"model.{_L}post_attention_layernorm.weight", (f"{_L}mlp_norm.weight",)),
)
LLAMA_QK_NORM = tuple(
    TensorMap(f"model.{_L}self_attn.{x}_norm.weight", (f"{_L}attention.{x}_norm.weight",)) for x in "qk"
)
_LLAMA_OUTER = (
    TensorMap("model.embed_tokens.weight", ("embedding.weight",)),
    TensorMap("model.norm.weight", ("final_norm.weight",)),
    TensorMap("lm_head.weight", ("head.weight",)),
)
LLAMA_MAPS = _LLAMA_OUTER + _with_biases(
    _LLAMA_LAYER, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
_QKV = tuple(f"{_L}attention.{x}.weight" for x in "qkv")
GPT2_MAPS = (
    TensorMap("transformer.wte.weight", ("embedding.weight",)),
    TensorMap("transformer.wpe.weight", ("positions.weight",)),
    TensorMap("lm_head.weight", ("head.weight",)),
    *_with_biases(
        (
            TensorMap("transformer.ln_f.weight", ("final_norm.weight",)),
            TensorMap("transformer.h.{i}.ln_1.weight", (f"{_L}attention_norm.weight",)),
            TensorMap("transformer.h.{i}.ln_2.weight", (f"{_L}mlp_norm.weight",)),
            TensorMap("transformer.h.{i}.attn.c_attn.weight", _QKV, transposed=True),
            TensorMap("transformer.h.{i}.attn.c_proj.weight", (f"{_L}attention.o.weight",), True, True),
            TensorMap("transformer.h.{i}.mlp.c_fc.weight", (f"{_L}mlp.up.weight",), transposed=True),
            TensorMap("transformer.h.{i}.mlp.c_proj.weight", (f"{_L}mlp.down.weight",), True, True),
        ),
        ("ln_f", "ln_1", "ln_2", "c_attn", "c_proj", "c_fc"),
    ),
)
NEOX_MAPS = (
    TensorMap("gpt_neox.embed_in.weight", ("embedding.weight",)),
    TensorMap("embed_out.weight", ("head.weight",)),
    *_with_biases(
        (
            TensorMap("gpt_neox.final_layer_norm.weight", ("final_norm.weight",)),
            TensorMap("gpt_neox.layers.{i}.input_layernorm.weight", (f"{_L}attention_norm.weight",)),
            TensorMap("gpt_neox.layers.{i}.post_attention_layernorm.weight", (f"{_L}mlp_norm.weight",)),
            TensorMap("gpt_neox.layers.{i}.attention.query_key_value.weight", _QKV, per_head=True),
            TensorMap("gpt_neox.layers.{i}.attention.dense.weight", (f"{_L}attention.o.weight",), contracts=True),
            TensorMap("gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight", (f"{_L}mlp.up.weight",)),
            TensorMap("gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight", (f"{_L}mlp.down.weight",), contracts=True),
        ),
        (
            "final_layer_norm",
            "input_layernorm",
            "post_attention_layernorm",
            "query_key_value",
            "dense",
            "dense_h_to_4h",
            "dense_4h_to_h",
        ),
    ),
)
