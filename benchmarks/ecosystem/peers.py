"""peft's adapters and transformers' hidden states on SmolLM2-135M, beside ours."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks import smollm2
from benchmarks.harness import Figure, largest_difference
from flextron.checkpoints.peft.reading import read_adapter
from flextron.engine import EngineCore, EngineSettings, Pooling
from flextron.generation.sampling import SamplingParams
from flextron.model.batch import Batch

__all__ = ["adapters_of_peft", "vectors_of_transformers"]

_KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": "all-linear"},
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "own head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@torch.no_grad()
def adapters_of_peft() -> Figure:
    """Adapters that peft wrote, served here, against peft."""
    decoder, tokens, worst = smollm2.decoder(), smollm2.eval_sequences(64, 64), 0.0
    for i, options in enumerate(_KINDS.values()):
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            theirs = get_peft_model(smollm2.peer(), LoraConfig(r=8, task_type="CAUSAL_LM", **options)).eval()
            generator = torch.Generator().manual_seed(i)
            for name, p in theirs.named_parameters():
                if "lora_" in name and "magnitude" not in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
                elif "modules_to_save" in name or "magnitude" in name:
                    p.mul_(1 + 0.1 * torch.rand(p.shape, generator=generator))
            theirs.save_pretrained(folder, save_embedding_layers=False)
            adapter = read_adapter(Path(folder), decoder)
            wanted = theirs(tokens, use_cache=False).logits[0]
        batch = Batch.ragged([tokens[0]], [decoder.widths], adapters=[adapter])
        found = decoder.logits(decoder(batch), adapter.outer)
        worst = max(worst, largest_difference(found, wanted))
    return Figure(
        name="adapters that peft wrote: largest relative difference of logits from peft",
        value=worst,
        unit="relative",
        op="<=",
        bar=1e-4,
        note=f"SmolLM2-135M, float32, 64 tokens, rank 8: {', '.join(_KINDS)}",
    )


@torch.no_grad()
def vectors_of_transformers() -> Figure:
    """Vectors of `/v1/embeddings`, as the engine makes them, against transformers' hidden states."""
    decoder, peer = smollm2.decoder(), smollm2.peer()
    core = EngineCore(decoder, EngineSettings(kv_cache_gb=0.5))
    network, params = core.network(decoder.widths), SamplingParams(max_tokens=0)
    prompts = [row[: 5 + 13 * i].tolist() for i, row in enumerate(smollm2.eval_sequences(8 * 128, 128))]
    kinds: tuple[Pooling, ...] = ("mean", "last")
    asked = [(p, k, core.add(f"{i}{k}", p, params, network, pooling=k)) for i, p in enumerate(prompts) for k in kinds]
    while core.has_unfinished:
        core.step()
    worst = 0.0
    for prompt, kind, request in asked:
        states = peer(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states[-1][0]
        wanted = states.mean(0) if kind == "mean" else states[-1]
        assert request.pooled is not None
        worst = max(worst, float((request.pooled.vector - wanted).norm() / wanted.norm()))
    return Figure(
        name="embeddings: largest distance from transformers' pooled hidden states",
        value=worst,
        unit="relative",
        op="<=",
        bar=1e-4,
        note=f"SmolLM2-135M, float32, {len(prompts)} texts of up to {max(map(len, prompts))} tokens, mean and last",
    )
