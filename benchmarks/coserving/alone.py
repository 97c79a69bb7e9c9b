"""Finetuning alone: memory and throughput beside peft."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks import smollm2
from benchmarks.coserving.models import smollm2_decoder
from benchmarks.harness import Figure, interleaved_seconds, median, ratios
from benchmarks.peft_memory import saved_by_chunks, saved_by_peft
from flextron.finetuning.example import Example
from flextron.finetuning.layerwise import Finetuning
from flextron.finetuning.recompute import KEEPABLE
from flextron.model.adapter import Adapter

__all__ = ["instruct_throughput", "peak_throughput", "saved_bytes"]


def saved_bytes() -> Figure:
    """Saved activation bytes at sequence 1024 against PyTorch and peft."""
    layers, whole = saved_by_peft()
    ours = saved_by_chunks()
    return Figure(
        name="bytes kept for the backward pass, 1,024 tokens of SmolLM2-135M, against peft's, head and loss left out",
        value=100 * ours / layers,
        unit="%",
        op="<=",
        bar=13,
        peer={"name": "PyTorch and peft, MB", "value": layers / 1e6},
        note=f"{ours / 1e6:.0f} MB; peft with head and loss {whole / 1e6:.0f} MB, of which that is {ours / whole:.1%}",
    )


def peak_throughput() -> Figure:
    """Finetuning alone against peft and transformers, sequences of equal length."""
    tokens = smollm2.eval_sequences(4 * 512, 512)
    batch = [(row, torch.ones(512)) for row in tokens]
    return _against_peft("4 sequences of 512 tokens, every token learnt", [batch])


def instruct_throughput() -> Figure:
    """Finetuning alone against peft and transformers, prompts and answers of many lengths."""
    rng = random.Random("instruct")
    text = smollm2.eval_sequences(16 * 512, 512)
    rows = [(row[:n], (torch.arange(n) >= n // 2).float()) for row in text for n in [_length(rng)]]
    batches = [rows[k : k + 8] for k in range(0, len(rows), 8)]
    return _against_peft("8 prompts with answers a step, the answers learnt", batches)


def _length(rng: random.Random) -> int:
    return min(max(16, round(rng.lognormvariate(4.8, 0.7))), 512)


def _against_peft(name: str, batches: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> Figure:
    """Optimizer steps on batches of (tokens, weights of 0 or 1); peft gets them padded, as its users' trainers do."""
    decoder, model = smollm2_decoder(), smollm2.peer()
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs: Any = get_peft_model(model, config).train()  # type: ignore[arg-type]
    adapter = Adapter.lora(decoder.config, rank=16, alpha=32)
    optimizers = [torch.optim.AdamW(m, lr=1e-5, fused=True) for m in (_trained(theirs), list(adapter.parameters()))]
    pad = torch.nn.utils.rnn.pad_sequence

    def peft() -> None:
        for batch in batches:
            tokens = pad([t for t, _ in batch], batch_first=True)
            mask = pad([torch.ones_like(t) for t, _ in batch], batch_first=True)
            labels = pad([torch.where(w > 0, t, -100) for t, w in batch], batch_first=True, padding_value=-100)
            theirs(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
            optimizers[0].step()
            optimizers[0].zero_grad()

    def ours(keep: frozenset[str]) -> None:
        for batch in batches:
            total = float(sum(w[1:].sum() for _, w in batch))
            half = len(batch) // 2
            for part in (batch[:half], batch[half:]):
                work = Finetuning(decoder, adapter, [Example(*e) for e in part], total_weight=total, keep=keep)
                while work.run(512):
                    pass
            optimizers[1].step()
            optimizers[1].zero_grad()

    jobs = {"peft": peft, "kept": lambda: ours(KEEPABLE), "recomputed": lambda: ours(frozenset())}
    times = interleaved_seconds(jobs, 2)
    spread = median(ratios(times, "peft", "kept"))
    lean = median(ratios(times, "peft", "recomputed"))[1]
    count = sum(len(t) for batch in batches for t, _ in batch)
    return Figure(
        name=f"finetuning alone, tokens a second, against peft and transformers: {name}",
        value=spread[1],
        unit="x",
        op=">=",
        bar=1.2,
        peer={"name": "peft and transformers, tokens/s", "value": count / median(times["peft"])[1]},
        spread=spread,
        note=(
            f"{count / median(times['kept'])[1]:.0f} tokens/s, rank 16, all linears, all that can be kept is; "
            f"with the least memory (the figure of bytes) {lean:.2f}x"
        ),
    )


def _trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]
