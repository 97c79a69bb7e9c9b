"""What the GPU suite runs on: sizes, a model drawn at random in transformers' code, and the same weights in ours."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flextron.families.config import config_from_hf
from flextron.model.cost import num_parameters
from flextron.model.decoder import Decoder
from flextron.model.device import wait_for
from flextron.spec import SubnetSpec

__all__ = ["SHARES", "Setting", "decoder", "num_bytes", "peer", "seconds_left", "setting", "spec_of", "use"]

SHARES = (1.0, 0.75, 0.5)
"""Of neurons and attention groups: the full network, and two sub-networks."""
_SECONDS = 480
"""After so many, peers are no longer compiled, so that the suite ends within nine minutes."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of the suite."""

    device: str
    dtype: torch.dtype
    shape: dict[str, Any]
    """Sizes of the model that is timed."""
    small: dict[str, Any]
    """Sizes of the model whose tokens are compared, in float32."""
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    """Tokens of the prompts that are timed."""
    context: int
    """Tokens that each sequence holds when it decodes."""
    steps: int
    """Decode iterations that are timed."""
    num_requests: int
    answers: tuple[int, int]
    kv_cache_gb: float
    training: tuple[int, int]
    """Sequences and tokens of each in a training step."""
    copied_bytes: int
    compiles: bool
    """Whether transformers may compile its decode step, as it does by itself with a static cache on a GPU."""
    repeats: int
    name: str

    @classmethod
    def gpu(cls) -> Setting:
        """For a GPU of some tens of gigabytes: the shape of Llama 3.2 1B."""
        return cls(
            device="cuda",
            dtype=torch.bfloat16,
            shape=_shape(2048, 8192, 16, 32, 8, 128256, 64),
            small=_shape(576, 1536, 30, 9, 3, 49152, 64),
            batches=(1, 16, 64),
            prompts=(512, 2048),
            context=128,
            steps=40,
            num_requests=64,
            answers=(32, 160),
            kv_cache_gb=4.0,
            training=(8, 512),
            copied_bytes=2 * 10**9,
            compiles=True,
            repeats=5,
            name="Llama-3.2-1B's shape",
        )

    @classmethod
    def rehearsal(cls) -> Setting:
        """For a CPU and less than a minute."""
        tiny = _shape(64, 128, 2, 4, 4, 300, 16)
        return cls(
            device="cpu",
            dtype=torch.float32,
            shape=tiny,
            small=tiny,
            batches=(1, 4),
            prompts=(24, 48),
            context=12,
            steps=3,
            num_requests=6,
            answers=(4, 8),
            kv_cache_gb=0.02,
            training=(2, 32),
            copied_bytes=10**6,
            compiles=False,
            repeats=1,
            name="a tiny shape",
        )


def _shape(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, head: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": None,
    }


_chosen: list[Setting] = []
_began = time.monotonic()


def use(chosen: Setting) -> None:
    """Take the sizes of this run."""
    _chosen[:] = [chosen]


def setting() -> Setting:
    """The sizes of this run."""
    return _chosen[0]


def seconds_left() -> float:
    """Seconds in which peers may still compile."""
    return _SECONDS - (time.monotonic() - _began)


@cache
def peer(small: bool = False, dtype: torch.dtype | None = None) -> LlamaForCausalLM:
    """Transformers' model with random weights; the same ones at every call, whatever their type."""
    own = setting()
    config = LlamaConfig(**(own.small if small else own.shape))
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if small else dtype or own.dtype)
    try:
        with torch.device(own.device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def decoder(small: bool = False, dtype: torch.dtype | None = None) -> Decoder:
    """Ours with the weights of `peer`; a fresh copy."""
    theirs = peer(small, dtype)
    with torch.device("meta"):
        ours = Decoder(config_from_hf(theirs.config.to_dict())).eval().requires_grad_(False)
    ours = ours.to_empty(device=setting().device).to(theirs.dtype)
    ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
    ours.final_norm.weight.copy_(theirs.model.norm.weight)
    for layer, own in zip(theirs.model.layers, ours.layers, strict=True):
        own.attention_norm.weight.copy_(layer.input_layernorm.weight)
        own.mlp_norm.weight.copy_(layer.post_attention_layernorm.weight)
        for name in ("q", "k", "v"):
            getattr(own.attention, name).weight.copy_(getattr(layer.self_attn, f"{name}_proj").weight)
        for name in ("gate", "up"):
            getattr(own.mlp, name).weight.copy_(getattr(layer.mlp, f"{name}_proj").weight)
        # ours holds these two by rows of what they read
        own.attention.o.weight.copy_(layer.self_attn.o_proj.weight.t())
        own.mlp.down.weight.copy_(layer.mlp.down_proj.weight.t())
    wait_for(ours.device)
    return ours


@cache
def spec_of(share: float, small: bool = False) -> SubnetSpec:
    """The uniform sub-network with a share of the neurons and of the attention groups."""
    shape = setting().small if small else setting().shape
    return SubnetSpec.uniform(
        num_hidden_layers=shape["num_hidden_layers"],
        intermediate_size=int(shape["intermediate_size"] * share),
        num_groups=max(1, int(shape["num_key_value_heads"] * share)),
    )


def num_bytes(ours: Decoder, spec: SubnetSpec, sequences: int, context: int) -> float:
    """What a decode iteration must read: the weights once, and keys and values of each sequence."""
    config = ours.config
    heads = sum(config.kv_rows(layer.num_groups) for layer in spec.layers)
    return ours.dtype.itemsize * (num_parameters(config, spec) + 2.0 * heads * context * sequences)
