"""SmolLM2-135M for the benchmarks: as a Hugging Face checkpoint, as transformers has it, as we have it."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flextron import ElasticModel, SubnetSpec
from flextron.api import convert, evaluation_text
from flextron.api.texts import sequences
from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder, write_checkpoint
from flextron.families.pretrained import Pretrained
from flextron.model.decoder import Decoder
from flextron.routing import Frontier, FrontierPoint, device_fingerprint
from flextron.workflows.demo import default_model

__all__ = ["checkpoint", "decoder", "elastic", "eval_sequences", "peer", "pretrained", "sharded_checkpoint"]


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


@cache
def elastic() -> ElasticModel:
    """As an elastic model, not trained; its sub-network for 0.6 is any heterogeneous one, and latencies are made up."""
    model = convert(default_model(), calibration=["The river ran past the mill. " * 200] * 20)
    device = device_fingerprint(model.decoder.device, model.decoder.dtype)
    points = [_point(model, 1.0, model.space.full), _point(model, 0.6, model.space.heterogeneous(0.6, Random(1)))]
    model.frontier = Frontier.of(device, "made up", points)
    return model


def _point(model: ElasticModel, latency: float, spec: SubnetSpec) -> FrontierPoint:
    return FrontierPoint(
        spec=spec,
        kind="heterogeneous",
        params=model.num_parameters(spec),
        mem_bytes=4 * model.num_parameters(spec),
        latency_ms=10 * latency,
        latency=latency,
        loss=4 - latency,
    )


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
