"""transformers beside us: sub-networks in its own code, greedy generation, and its continuous batching."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks.workload import Request
from flextron.elastic import extract
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["ContinuousBatching", "dense", "greedy"]


def dense(checkpoint: Path, decoder: Decoder, spec: SubnetSpec) -> PreTrainedModel:
    """A sub-network's extracted dense model in transformers' Llama code, whose layers may differ in width.

    Args:
        checkpoint: elastic checkpoint.
        decoder: what it holds.
        spec: the sub-network; layers are skipped whole or not at all.
    """
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    kept = nn.ModuleList()
    for layer, ours, widths in zip(theirs.model.layers, extract(decoder, spec).layers, spec.layers, strict=True):
        if widths.is_skipped:
            continue
        for name in ("q", "k", "v"):
            getattr(layer.self_attn, f"{name}_proj").weight = getattr(ours.attention, name).weight
        for name in ("gate", "up"):
            getattr(layer.mlp, f"{name}_proj").weight = getattr(ours.mlp, name).weight
        # ours holds these two by rows of what they read
        layer.self_attn.o_proj.weight = nn.Parameter(ours.attention.o.weight.t().contiguous())
        layer.mlp.down_proj.weight = nn.Parameter(ours.mlp.down.weight.t().contiguous())
        layer.self_attn.layer_idx = len(kept)
        kept.append(layer)
    theirs.model.layers, theirs.config.num_hidden_layers = kept, len(kept)
    return theirs


def greedy(model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """The likeliest tokens after each prompt, all in one batch with padding on the left."""
    length = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    out: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens)
    return out[:, length:].tolist()


class ContinuousBatching:
    """transformers' own continuous batching; a context manager."""

    def __init__(self, model: PreTrainedModel, *, num_slots: int, max_tokens: int) -> None:
        """Reserve its cache and start its thread.

        Args:
            model: on the CPU.
            num_slots: requests that run at once.
            max_tokens: of a request, prompt and answer.
        """
        page = 32
        settings = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=num_slots * -(-max_tokens // page),
            max_batch_tokens=512,
            max_requests_per_batch=num_slots,
        )
        self._manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0), settings
        )
        self._manager.start()

    def serve(self, requests: Sequence[Request]) -> tuple[float, list[list[int]]]:
        """Seconds for all requests, and the answers.

        Raises:
            RuntimeError: its thread ended, or a request failed.
        """
        start = time.perf_counter()
        ids = [self._manager.add_request(r.prompt, max_new_tokens=r.num_tokens) for r in requests]
        answers: dict[str | None, list[int]] = {}
        while len(answers) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.error is not None:
                raise RuntimeError(f"transformers' continuous batching: {result.error}")
            if result is not None and result.is_finished():
                answers[result.request_id] = result.generated_tokens
            elif result is None and not self._manager.is_running():
                raise RuntimeError("transformers' continuous batching ended on its own")
        return time.perf_counter() - start, [answers[i] for i in ids]

    def __enter__(self) -> ContinuousBatching:
        """Nothing more to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread."""
        self._manager.stop(block=True)
        self._manager.destroy()
