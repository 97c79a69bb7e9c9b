"""Random adapters, and decoders into which they are merged: the reference that knows nothing of bypasses."""

from __future__ import annotations

import copy
from typing import Any

import torch

from flextron.model.adapter import TARGETS, Adapter
from flextron.model.bypass import Ia3, Lora
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder
from flextron.model.nested import Contraction


def targets_of(config: DecoderConfig) -> list[str]:
    """The linears that the family has."""
    return [t for t in TARGETS if config.gated or t != "gate"]


def randomize(adapter: Adapter, seed: int = 0) -> Adapter:
    """Make every bypass matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + float(name.endswith("factors")))
    return adapter


def random_lora(config: DecoderConfig, rank: int = 3, seed: int = 0, **options: Any) -> Adapter:
    """LoRA with B not zero."""
    return randomize(Adapter.lora(config, rank=rank, alpha=2 * rank + 1, **options), seed)


def random_ia3(config: DecoderConfig, seed: int = 0, **options: Any) -> Adapter:
    """IA3 beside all linears, those out of a nested dimension by their inputs."""
    options = {"targets": targets_of(config), "input_targets": ("o", "down")} | options
    return randomize(Adapter.ia3(config, **options), seed)


@torch.no_grad()
def merged(decoder: Decoder, adapter: Adapter) -> Decoder:
    """A decoder whose own weights do what decoder and adapter do together."""
    out = copy.deepcopy(decoder)
    for i in adapter.adapted_layers:
        for target, bypass in adapter.at(i).items():
            half: Any = out.layers[i]
            linear = getattr(half.attention if target in "qkvo" else half.mlp, target)
            weight = linear.weight.t() if isinstance(linear, Contraction) else linear.weight  # (out, in)
            if isinstance(bypass, Lora):
                weight += bypass.scale * bypass.b @ bypass.a.t()
            elif isinstance(bypass, Ia3):
                weight *= bypass.factors[None, :] if bypass.on_input else bypass.factors[:, None]
                if linear.bias is not None and not bypass.on_input:
                    linear.bias *= bypass.factors
    return out
