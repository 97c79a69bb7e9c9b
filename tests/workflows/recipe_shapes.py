"""Published shapes of the models that have recipes, their numbers of parameters, and a training step without memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, PretrainedConfig, Qwen3Config, SmolLM3Config

from flextron.elastic.adapter import norm_parameters
from flextron.families.config import config_from_hf
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.config import DecoderConfig
from flextron.model.cost import num_parameters, step_flops
from flextron.model.decoder import Decoder
from flextron.training.objective import Objective, Teacher
from flextron.training.recipe import TrainRecipe

__all__ = ["MODELS", "Budget", "budget", "decoder_config"]


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        **{"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads},
    }


def _smollm(*sizes: int) -> LlamaConfig:
    return LlamaConfig(**_shape(*sizes, 49152), max_position_embeddings=8192, tie_word_embeddings=True)


def _llama(*sizes: int) -> LlamaConfig:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"rope_theta": 5e5, "original_max_position_embeddings": 8192}
    shape = _shape(*sizes, 128256)
    return LlamaConfig(**shape, max_position_embeddings=131072, tie_word_embeddings=True, rope_parameters=scaling)


def _qwen(*sizes: int, tied: bool = True) -> Qwen3Config:
    return Qwen3Config(**_shape(*sizes, 151936), head_dim=128, max_position_embeddings=40960, tie_word_embeddings=tied)


def _pythia(hidden: int, layers: int, heads: int) -> GPTNeoXConfig:
    shape = _shape(hidden, 4 * hidden, layers, heads, heads, 50304)
    del shape["num_key_value_heads"]
    return GPTNeoXConfig(**shape, max_position_embeddings=2048)


MODELS: dict[str, tuple[PretrainedConfig, int]] = {
    "HuggingFaceTB/SmolLM2-135M": (_smollm(576, 1536, 30, 9, 3), 134_515_008),
    "HuggingFaceTB/SmolLM2-360M": (_smollm(960, 2560, 32, 15, 5), 361_821_120),
    "HuggingFaceTB/SmolLM2-1.7B": (_smollm(2048, 8192, 24, 32, 32), 1_711_376_384),
    "HuggingFaceTB/SmolLM3-3B-Base": (
        SmolLM3Config(**_shape(2048, 11008, 36, 16, 4, 128256), max_position_embeddings=65536),
        3_075_098_624,
    ),
    "meta-llama/Llama-3.2-1B": (_llama(2048, 8192, 16, 32, 8), 1_235_814_400),
    "meta-llama/Llama-3.2-3B": (_llama(3072, 8192, 28, 24, 8), 3_212_749_824),
    "Qwen/Qwen3-0.6B-Base": (_qwen(1024, 3072, 28, 16, 8), 596_049_920),
    "Qwen/Qwen3-1.7B-Base": (_qwen(2048, 6144, 28, 16, 8), 1_720_574_976),
    "Qwen/Qwen3-4B-Base": (_qwen(2560, 9728, 36, 32, 8), 4_022_468_096),
    "Qwen/Qwen3-8B-Base": (_qwen(4096, 12288, 36, 32, 8, tied=False), 8_190_735_360),
    "google/gemma-3-1b-pt": (
        Gemma3TextConfig(**_shape(1152, 6912, 26, 4, 1, 262144), max_position_embeddings=32768, sliding_window=512),
        999_885_952,
    ),
    "EleutherAI/pythia-410m": (_pythia(1024, 24, 16), 405_334_016),
    "EleutherAI/pythia-1.4b": (_pythia(2048, 24, 16), 1_414_647_808),
}
"""Config and published number of parameters of each source, tied ones counted once."""


def decoder_config(source: str) -> DecoderConfig:
    """Shape of a recipe's source."""
    return config_from_hf(MODELS[source][0].to_dict())


@dataclass(frozen=True)
class Budget:
    """What one process needs."""

    weights: int
    """Bytes of the student's weights, of the teacher's where these are others, and of their copies in bfloat16."""
    optimizer: int
    """Bytes of gradients and moments."""
    activations: int
    """Bytes of what a micro batch keeps for the backward pass, all widths full."""
    operations: float
    """Floating-point operations of the whole training, over all processes: student both ways, teacher forward."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.optimizer + self.activations


@contextmanager
def _kept(own: set[int]) -> Iterator[list[int]]:
    """Bytes of the tensors that autograd keeps, each storage once, without those of `own`."""
    total, seen = [0], set(own)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total[0] += storage.nbytes()
            alive.append(tensor)  # a freed storage's number would come again
        return tensor

    alive: list[Tensor] = []
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def budget(config: DecoderConfig, recipe: TrainRecipe) -> Budget:
    """Run one micro batch on the meta device, forward and backward, and count."""
    is_low = recipe.precision == "bf16"
    with torch.device("meta"):
        decoder, teacher = Decoder(config), Decoder(config)
        adapter = None
        if recipe.lora_rank is not None:
            adapter = Adapter.lora(config, rank=recipe.lora_rank, alpha=recipe.lora_rank)
        tokens_BT = torch.zeros(min(recipe.micro_batch_size, recipe.batch_size), recipe.context, dtype=torch.long)
    frozen = ("embedding.", "positions.", "head.")
    trained = [p for n, p in decoder.named_parameters() if not n.startswith(frozen)]
    if adapter is not None:
        trained = [*adapter.parameters(), *norm_parameters(decoder).values()]
    decoder.requires_grad_(False)
    for p in trained:
        p.requires_grad_()
    if is_low:
        for module in (decoder, teacher, *(() if adapter is None else (adapter,))):
            module.to(torch.bfloat16)
    objective = Objective(decoder, recipe, adapter)
    taught = Teacher(teacher, tokens_BT[:1])(tokens_BT)
    batch = Batch.dealt(tokens_BT, [config.full_spec], adapter=adapter)
    rows = torch.zeros(max(1, round(recipe.kl_fraction * tokens_BT.numel())), dtype=torch.long, device="meta")
    own = {p.untyped_storage()._cdata for p in decoder.parameters()}
    with _kept(own) as kept:
        loss = objective(batch, taught, rows)["loss"]
    loss.backward()
    assert all(p.grad is not None for p in trained)

    count, trains = num_parameters(config, config.full_spec), sum(p.numel() for p in trained)
    copies = 1 if adapter is not None else 2
    per_step = step_flops(config, config.full_spec, num_sequences=recipe.batch_size, length=recipe.context)
    steps = math.ceil(recipe.tokens / (recipe.batch_size * recipe.context))
    return Budget(
        weights=count * (4 * copies + 2 * is_low),
        optimizer=12 * trains,
        activations=kept[0],
        operations=steps * per_step * 4 / 3,
    )
