"""What vLLM computes of a Nemotron-NAS directory, spelt out: its `DeciLMForCausalLM`, on the CPU.

Written from a description of `nemotron_nas.py`, with what matters there: the config comes through `AutoConfig` and a
class in the directory; a norm adds the residual first and hands the sum on; a layer that lacks a half leaves both
alone; one number of query heads holds for all layers; an MLP's width is `ffn_mult`'s where there is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig


class Reference:
    """A directory's model, in float32."""

    def __init__(self, directory: Path) -> None:
        self.config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=True)
        self.weights = {
            name: tensor.float() for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
        }
        self.used: set[str] = set()

    def weight(self, name: str) -> Tensor:
        self.used.add(name)
        return self.weights[name]

    def linear(self, x: Tensor, name: str, *, bias: bool) -> Tensor:
        return F.linear(x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias") if bias else None)

    def norm(self, x: Tensor, residual: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        """A fused norm: (normalised sum, sum). vLLM's gives one tensor without a residual, which is no pair."""
        total = x if residual is None else x + residual
        scale = (total.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return total * scale * self.weight(f"{name}.weight"), total

    def frequencies(self) -> Tensor:
        rope, dim = self.config.rope_parameters, self.config.head_dim
        inverse = 1 / rope["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
        if rope["rope_type"] == "linear":
            return inverse / rope["factor"]
        if rope["rope_type"] == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            turns = rope["original_max_position_embeddings"] * inverse / (2 * torch.pi)
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
            return inverse * ((1 - smooth) / rope["factor"] + smooth)
        assert rope["rope_type"] == "default"
        return inverse

    def rotate(self, x_THd: Tensor) -> Tensor:
        angles = torch.arange(len(x_THd))[:, None, None] * self.frequencies()
        a, b = x_THd.chunk(2, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

    def attention(self, x: Tensor, name: str, heads_in_group: int) -> Tensor:
        config = self.config
        heads, dim = config.num_attention_heads, config.head_dim
        kv_heads = heads // heads_in_group
        biased = getattr(config, "qkv_bias", config.attention_bias)
        q, k, v = (self.linear(x, f"{name}.{part}_proj", bias=biased).view(len(x), -1, dim) for part in "qkv")
        assert (q.shape[1], k.shape[1], v.shape[1]) == (heads, kv_heads, kv_heads)
        q, k = self.rotate(q), self.rotate(k)
        k, v = (t.repeat_interleave(heads_in_group, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), is_causal=True)
        return self.linear(mixed[0].transpose(0, 1).flatten(1), f"{name}.o_proj", bias=config.attention_bias)

    def mlp(self, x: Tensor, name: str, ffn: Any) -> Tensor:
        if hasattr(ffn, "ffn_mult"):
            width = -(-int(2 * ffn.ffn_mult * self.config.hidden_size / 3) // 256) * 256
        else:
            width = ffn.intermediate_size
        gate, up = (self.linear(x, f"{name}.{part}_proj", bias=self.config.mlp_bias) for part in ("gate", "up"))
        assert gate.shape[-1] == width
        return self.linear(F.silu(gate) * up, f"{name}.down_proj", bias=self.config.mlp_bias)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores after each token, (T, vocabulary)."""
        x, residual = self.weight("model.embed_tokens.weight")[tokens], None
        assert len(self.config.block_configs) == self.config.num_hidden_layers
        for i, block in enumerate(self.config.block_configs):
            name = f"model.layers.{i}"
            if not block.attention.no_op:
                x, residual = self.norm(x, residual, f"{name}.input_layernorm")
                x = self.attention(x, f"{name}.self_attn", block.attention.n_heads_in_group)
            if not block.ffn.no_op:
                assert residual is not None, "vLLM's norm gives no pair here"
                x, residual = self.norm(x, residual, f"{name}.post_attention_layernorm")
                x = self.mlp(x, f"{name}.mlp", block.ffn)
        x, _ = self.norm(x, residual, "model.norm")
        return x @ self.weight("model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight").T
