"""Models from scratch: configs of the two families, and an initialiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from flextron.families.config import config_from_hf
from flextron.model.decoder import Decoder
from flextron.model.layers import Contraction
from flextron.spec import SubnetSpec

__all__ = ["FamilyName", "Shape", "fresh_decoder", "hf_config"]

FamilyName = Literal["llama", "gpt2"]

_EMBEDDING_STD = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a base model; its attention groups are its KV heads (GPT-2: its heads)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """GPT-2 has as many as query heads, whatever this says."""


def hf_config(family: FamilyName, shape: Shape, *, vocab_size: int, context: int, eos_token_id: int) -> dict[str, Any]:
    """The `config.json` of a base model."""
    shared = {"model_type": family, "vocab_size": vocab_size, "tie_word_embeddings": True}
    shared |= {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id}
    if family == "gpt2":
        return shared | {
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": shape.hidden_size,
            "n_inner": shape.intermediate_size,
            "n_layer": shape.num_hidden_layers,
            "n_head": shape.num_attention_heads,
            "n_positions": context,
        }
    return shared | {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.hidden_size // shape.num_attention_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
    }


@torch.no_grad()
def fresh_decoder(config: dict[str, Any], seed: int, widths: SubnetSpec | None = None) -> Decoder:
    """A decoder with random weights: variance 1 / inputs, less by the depth where a residual branch ends.

    Args:
        config: as of `hf_config`.
        seed: of the weights.
        widths: of a narrower or shallower model of the same hidden size; the config's by default.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(config_from_hf(config), widths)
    depth = max(1, len(decoder.widths.kept_layers))
    for module in decoder.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.normal_(0, _EMBEDDING_STD, generator=generator)
        elif isinstance(module, Contraction):  # stored as (in, out), and ends a residual branch
            module.weight.normal_(0, (max(1, len(module.weight)) * 2 * depth) ** -0.5, generator=generator)
        elif isinstance(module, torch.nn.Linear):
            module.weight.normal_(0, module.weight.shape[1] ** -0.5, generator=generator)
        else:
            continue
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
    return decoder
