"""Hugging Face's tensor names, as data: where each tensor goes, and how fused ones come apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "GEMMA_MAPS",
    "GPT2_MAPS",
    "LLAMA_MAPS",
    "LLAMA_QK_NORM",
    "NEOX_MAPS",
    "OLMO2_MAPS",
    "PHI3_MAPS",
    "STABLELM_MAPS",
    "TensorMap",
]


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

    def split(self, tensor: Tensor, sizes: Sequence[int], head_dim: int) -> tuple[Tensor, ...]:
        """Split the checkpoint's tensor into one (rows, ...) tensor for each of `ours`, of so many rows."""
        rows = tensor.t() if self.is_turned and tensor.dim() == 2 else tensor
        if len(self.ours) == 1:
            return (rows,)
        if not self.per_head:
            return torch.split(rows, list(sizes))
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
_LLAMA_LINEARS = (
    *(TensorMap(f"model.{_L}self_attn.{x}_proj.weight", (f"{_L}attention.{x}.weight",)) for x in "qkv"),
    TensorMap(f"model.{_L}self_attn.o_proj.weight", (f"{_L}attention.o.weight",), contracts=True),
    *(TensorMap(f"model.{_L}mlp.{x}_proj.weight", (f"{_L}mlp.{x}.weight",)) for x in ("gate", "up")),
    TensorMap(f"model.{_L}mlp.down_proj.weight", (f"{_L}mlp.down.weight",), contracts=True),
)


def _norms(**names: str) -> tuple[TensorMap, ...]:
    """A layer's norms: names here, and in the checkpoint."""
    return tuple(TensorMap(f"model.{_L}{hf}.weight", (f"{_L}{ours}.weight",)) for ours, hf in names.items())


_LLAMA_NORMS = _norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
LLAMA_QK_NORM = tuple(
    TensorMap(f"model.{_L}self_attn.{x}_norm.weight", (f"{_L}attention.{x}_norm.weight",)) for x in "qk"
)
_LLAMA_OUTER = (
    TensorMap("model.embed_tokens.weight", ("embedding.weight",)),
    TensorMap("model.norm.weight", ("final_norm.weight",)),
    TensorMap("lm_head.weight", ("head.weight",)),
)
_LLAMA_BIASES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LLAMA_BIASED = _with_biases(_LLAMA_LINEARS, _LLAMA_BIASES)
_POST_NORMS = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
LLAMA_MAPS = _LLAMA_OUTER + _LLAMA_BIASED + _LLAMA_NORMS
OLMO2_MAPS = _LLAMA_OUTER + _LLAMA_BIASED + LLAMA_QK_NORM + _norms(**_POST_NORMS)
GEMMA_MAPS = (
    *(_LLAMA_OUTER + _LLAMA_BIASED),
    *_norms(attention_norm="input_layernorm", mlp_norm="pre_feedforward_layernorm", **_POST_NORMS),
)
STABLELM_MAPS = (
    *_with_biases(_LLAMA_OUTER, ("norm",)),
    *_LLAMA_BIASED,
    *_with_biases(_LLAMA_NORMS, ("input_layernorm", "post_attention_layernorm")),
)
_QKV = tuple(f"{_L}attention.{x}.weight" for x in "qkv")
PHI3_MAPS = (
    *_LLAMA_OUTER,
    TensorMap(f"model.{_L}self_attn.qkv_proj.weight", _QKV),
    TensorMap(f"model.{_L}mlp.gate_up_proj.weight", tuple(f"{_L}mlp.{x}.weight" for x in ("gate", "up"))),
    *(m for m in _LLAMA_LINEARS if m.contracts),
    *_LLAMA_NORMS,
)
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
