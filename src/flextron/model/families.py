"""The supported families, as data: traits, Hugging Face tensor names and how fused tensors come apart.

Adding a family means adding one entry to `FAMILIES`; nothing else in the package knows a family's name. Configs are
parsed by `transformers`, so that its defaults hold wherever a `config.json` leaves a key out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from flextron.errors import FlextronError, UnsupportedModelError
from flextron.model.config import DecoderConfig, Rope

__all__ = ["FAMILIES", "Family", "TensorMap", "config_from_hf", "family_of"]


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
        """From the checkpoint's tensor to one (rows, ...) tensor for each of `ours`."""
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
_LLAMA_QK_NORM = tuple(
    TensorMap(f"model.{_L}self_attn.{x}_norm.weight", (f"{_L}attention.{x}_norm.weight",)) for x in "qk"
)
_LLAMA_OUTER = (
    TensorMap("model.embed_tokens.weight", ("embedding.weight",)),
    TensorMap("model.norm.weight", ("final_norm.weight",)),
    TensorMap("lm_head.weight", ("head.weight",)),
)
_LLAMA_MAPS = _LLAMA_OUTER + _with_biases(
    _LLAMA_LAYER, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
_QKV = tuple(f"{_L}attention.{x}.weight" for x in "qkv")
_GPT2_MAPS = (
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
_NEOX_MAPS = (
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Traits of a family. A trait given as a string is the name of the config attribute that holds it."""

    architecture: str
    """The `transformers` class of its checkpoints."""
    tensors: tuple[TensorMap, ...]
    """All tensors that a checkpoint of the family can have; the decoder decides which it needs."""
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: str = "rms_norm_eps"
    activation: str = "hidden_act"
    gated: bool = True
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    rotary: bool = True
    parallel_residual: bool | str = False
    explicit_head_dim: bool = True
    """Whether a stock checkpoint may have fewer heads than hidden_size / head_dim."""
    heads_divide_hidden: bool = False
    """Whether `transformers` insists that the number of heads divide the hidden size, whatever the head size."""
    config_keys: Mapping[str, str] = field(default_factory=dict)
    """Names in `config.json` where they differ from Hugging Face's usual ones."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        tensors=_LLAMA_MAPS,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        heads_divide_hidden=True,
    ),
    "mistral": Family(architecture="MistralForCausalLM", tensors=_LLAMA_MAPS),
    "qwen2": Family(architecture="Qwen2ForCausalLM", tensors=_LLAMA_MAPS, qkv_bias=True),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        tensors=_LLAMA_MAPS + _LLAMA_QK_NORM,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        tensors=_GPT2_MAPS,
        norm="layer",
        norm_eps="layer_norm_epsilon",
        activation="activation_function",
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        rotary=False,
        explicit_head_dim=False,
        config_keys={"intermediate_size": "n_inner", "num_hidden_layers": "n_layer"},
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        tensors=_NEOX_MAPS,
        norm="layer",
        norm_eps="layer_norm_eps",
        gated=False,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias=True,
        parallel_residual="use_parallel_residual",
        explicit_head_dim=False,
    ),
}


def family_of(hf_config: Mapping[str, Any]) -> str:
    """The key of the checkpoint's family.

    Raises:
        UnsupportedModelError: no family describes it; lists those that exist.
    """
    name = hf_config.get("model_type")
    if name not in FAMILIES:
        what = (hf_config.get("architectures") or [name or "without a model_type"])[0]
        raise UnsupportedModelError(f"architecture {what} is not supported; supported are {', '.join(FAMILIES)}")
    return str(name)


def _rope(hf: PretrainedConfig) -> Rope:
    """Rotary settings: `rope_parameters` since transformers 5, scattered attributes before."""
    parameters = dict(getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {})
    theta: Any = parameters.pop("rope_theta", None) or getattr(hf, "rope_theta", None)
    theta = theta or getattr(hf, "rotary_emb_base", 10_000)
    fraction = parameters.pop("partial_rotary_factor", None) or getattr(hf, "rotary_pct", 1.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedModelError(f"rope scaling of type {kind!r} is not supported; default, linear and llama3 are")
    return Rope(theta=float(theta), fraction=float(fraction), scaling=None if kind == "default" else parameters)


def _sliding_window(hf: PretrainedConfig) -> int | None:
    """The window, where every layer has one; families that mix windowed and full layers are refused."""
    window = getattr(hf, "sliding_window", None)
    kinds = set(getattr(hf, "layer_types", None) or ())
    if window is None or kinds == {"full_attention"} or not getattr(hf, "use_sliding_window", True):
        return None
    if len(kinds) > 1:
        raise UnsupportedModelError("models that mix sliding-window and full attention layers are not supported")
    return int(window)


def config_from_hf(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """Read a `config.json`.

    Raises:
        UnsupportedModelError: the architecture, its activation or its rope scaling has no implementation.
        FlextronError: the config lacks what its family needs.
    """
    name = family_of(hf_config)
    family = FAMILIES[name]
    try:
        hf = AutoConfig.for_model(**{k: v for k, v in hf_config.items() if k != "auto_map"})
    except Exception as error:  # transformers raises many kinds, all meaning that the config is malformed
        raise FlextronError(f"config.json is not a valid {name} config: {error}") from error

    if getattr(hf, "scale_attn_by_inverse_layer_idx", False) or not getattr(hf, "scale_attn_weights", True):
        raise UnsupportedModelError("GPT-2 with rescaled attention scores is not supported; only the usual scaling is")

    def trait(value: bool | str) -> bool:
        return bool(getattr(hf, value)) if isinstance(value, str) else value

    heads = hf.num_attention_heads
    return DecoderConfig(
        family=name,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=getattr(hf, "intermediate_size", None) or getattr(hf, "n_inner", None) or 4 * hf.hidden_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(hf, "num_key_value_heads", None) or heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        max_position_embeddings=hf.max_position_embeddings,
        norm=family.norm,
        norm_eps=getattr(hf, family.norm_eps),
        activation=getattr(hf, family.activation),
        gated=family.gated,
        qkv_bias=trait(family.qkv_bias),
        output_bias=trait(family.output_bias),
        mlp_bias=trait(family.mlp_bias),
        qk_norm=family.qk_norm,
        rope=_rope(hf) if family.rotary else None,
        parallel_residual=trait(family.parallel_residual),
        sliding_window=_sliding_window(hf),
        tie_word_embeddings=bool(hf.tie_word_embeddings),
    )
