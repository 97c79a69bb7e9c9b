"""What llama.cpp computes of a GGUF file, spelt out: its graphs of `deci`, `llama` and `openelm`.

Written from their description, row by row, with the peculiarities that matter: the head size comes from the key's
length only if the first layer has heads; a layer whose MLP has no width is passed over, attention and all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class ReferenceModel:
    """A file's model; only float32 files are read."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {t.name: torch.from_numpy(np.array(t.data, dtype=np.float32)) for t in reader.tensors}
        self.arch = self.fields["general.architecture"]
        assert self.arch in ("deci", "llama", "openelm")
        self.used: set[str] = set()

    def key(self, name: str) -> Any:
        return self.fields[f"{self.arch}.{name}"]

    def sizes(self, name: str) -> list[int]:
        """One number a layer; `llama` has one for all."""
        found = self.key(name)
        return found if isinstance(found, list) else [found] * self.key("block_count")

    def tensor(self, name: str) -> Tensor:
        self.used.add(name)
        return self.tensors[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.tensor(f"{name}.weight").T
        return y + self.tensor(f"{name}.bias") if f"{name}.bias" in self.tensors else y

    def norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.key("attention.layer_norm_rms_epsilon")
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.tensor(f"{name}.weight")

    def rotate(self, x_THd: Tensor) -> Tensor:
        """Pairs are half a head apart in `openelm`, and neighbours in the others."""
        dim, out = x_THd.shape[-1], torch.empty_like(x_THd)
        factors = self.tensor("rope_freqs.weight") if "rope_freqs.weight" in self.tensors else torch.ones(dim // 2)
        scale = self.fields.get(f"{self.arch}.rope.scaling.factor", 1.0)
        for j in range(dim // 2):
            a, b = (2 * j, 2 * j + 1) if self.arch != "openelm" else (j, j + dim // 2)
            speed = self.key("rope.freq_base") ** (-2 * j / dim) / float(factors[j]) / scale
            angle = torch.arange(len(x_THd))[:, None] * speed
            out[..., a] = x_THd[..., a] * angle.cos() - x_THd[..., b] * angle.sin()
            out[..., b] = x_THd[..., a] * angle.sin() + x_THd[..., b] * angle.cos()
        return out

    def attention(self, x: Tensor, layer: str, heads: int, kv_heads: int) -> Tensor:
        dim = self.key("attention.key_length") if self.sizes("attention.head_count")[0] else 0
        if self.arch == "openelm":
            rows = self.linear(x, f"{layer}.attn_qkv").view(len(x), -1, dim)
            q, k, v = rows.split([heads, kv_heads, kv_heads], dim=1)
            q, k = self.norm(q, f"{layer}.attn_q_norm"), self.norm(k, f"{layer}.attn_k_norm")
        else:
            q, k, v = (self.linear(x, f"{layer}.attn_{part}").view(len(x), -1, dim) for part in "qkv")
            assert (q.shape[1], k.shape[1], v.shape[1]) == (heads, kv_heads, kv_heads)
        q, k = self.rotate(q), self.rotate(k)
        out = []
        for h in range(heads):
            own = h // (heads // kv_heads)
            scores = q[:, h] @ k[:, own].T / dim**0.5
            scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ v[:, own])
        return self.linear(torch.cat(out, -1), f"{layer}.attn_output")

    def logits(self, tokens: list[int]) -> Tensor:
        """Scores after each token, (T, vocabulary)."""
        x = self.tensor("token_embd.weight")[tokens]
        heads, kv_heads = self.sizes("attention.head_count"), self.sizes("attention.head_count_kv")
        for i, width in enumerate(self.sizes("feed_forward_length")):
            layer = f"blk.{i}"
            if width == 0:
                continue
            if heads[i]:
                x = x + self.attention(self.norm(x, f"{layer}.attn_norm"), layer, heads[i], kv_heads[i])
            y = self.norm(x, f"{layer}.ffn_norm")
            gate, up = self.linear(y, f"{layer}.ffn_gate"), self.linear(y, f"{layer}.ffn_up")
            assert gate.shape[-1] == width
            x = x + self.linear(F.silu(gate) * up, f"{layer}.ffn_down")
        x = self.norm(x, "output_norm")
        return x @ self.tensor("output.weight" if "output.weight" in self.tensors else "token_embd.weight").T
