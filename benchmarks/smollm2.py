"""SmolLM2-135M for the benchmarks: as a Hugging Face checkpoint, as transformers has it, as we have it."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flextron.api import evaluation_text
from flextron.api.texts import sequences
from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder, write_checkpoint
from flextron.families.pretrained import Pretrained
from flextron.model.decoder import Decoder
from flextron.workflows.demo import default_model

__all__ = ["checkpoint", "decoder", "eval_sequences", "peer", "pretrained", "sharded_checkpoint"]


@cache
def pretrained() -> Pretrained:
    """The GGUF file of the demo."""
    return open_pretrained(default_model())


def decoder() -> Decoder:
    """A fresh copy of ours."""
    return load_decoder(pretrained()).eval().requires_grad_(False)


@cache
def _directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="flextron-bench-"))


def _written(name: str, shard_bytes: int) -> Path:
    path = _directory() / name
    if not path.exists():
        path.mkdir()
        source = pretrained()
        write_checkpoint(
            decoder(), path, hf_config=source.hf_config, tokenizer=source.tokenizer, shard_bytes=shard_bytes
        )
    return path


def checkpoint() -> Path:
    """In one file."""
    return _written("whole", 2**31)


def sharded_checkpoint() -> Path:
    """In shards of 128 MB."""
    return _written("sharded", 128 * 2**20)


def peer() -> PreTrainedModel:
    """As transformers has it."""
    return AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32).eval()


def eval_sequences(num_tokens: int = 4096, context: int = 256) -> Tensor:
    """Sequences of the held-out text of the demo."""
    return sequences(evaluation_text(), pretrained().tokenizer, num_tokens=num_tokens, context=context)
