"""Gradients in windows against autograd; losses and answers of co-serving against each side alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.coserving.load import (
    SLO,
    Played,
    Training,
    arrivals,
    engine,
    play,
    trainer,
)
from benchmarks.coserving.models import tiny_decoder
from benchmarks.harness import Figure
from flextron.engine import CoServing
from flextron.finetuning.example import Example
from flextron.finetuning.layerwise import Finetuning
from flextron.finetuning.recompute import KEEPABLE
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder

__all__ = ["gradients", "same_answers", "same_curve"]


def gradients() -> Figure:
    """Gradients in windows against autograd, float64, random cuts."""
    rng = random.Random("cuts")
    worst = 0.0
    cases = 0
    for num_groups, targets in ((2, None), (4, None), (1, ["k", "v"]), (2, ["q"]), (2, ["o"]), (2, ["gate", "down"])):
        decoder, adapter = _random_model(num_groups, targets)
        for _ in range(4):
            examples = [_example(rng.randint(5, 40), rng) for _ in range(rng.randint(1, 4))]
            expected = _autograd(decoder, adapter, examples)
            work = Finetuning(decoder, adapter, examples, keep=rng.choice([frozenset(), KEEPABLE]))
            while work.run(rng.randint(1, 24)):
                pass
            found = _taken(adapter)
            largest = max(float(g.abs().max()) for g in expected)
            for a, b in zip(found, expected, strict=True):
                worst = max(worst, float((a - b).abs().max()) / max(float(b.abs().max()), 1e-6 * largest))
            cases += 1
    return Figure(
        name="windowed gradients against autograd, float64: largest relative difference",
        value=worst,
        unit="relative",
        op="<=",
        bar=1e-10,
        note=f"{cases} packs of random examples, cuts drawn anew for every unit, grouped-query attention, all linears",
    )


def _random_model(num_groups: int, targets: Sequence[str] | None) -> tuple[Decoder, Adapter]:
    torch.manual_seed(num_groups)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": num_groups,
        "qk_norm": "head" if num_groups == 4 else None,
    }
    config = replace(tiny_decoder().config, **shape, **heads)  # type: ignore[arg-type]
    decoder = Decoder(config).double().requires_grad_(False)
    adapter = Adapter.lora(config, rank=4, alpha=8, targets=targets).double()
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.2)
    return decoder, adapter


def _example(length: int, rng: random.Random) -> Example:
    weights = (torch.arange(length) >= length // 3).double()
    return Example(torch.tensor([rng.randrange(64) for _ in range(length)]), weights)


def _autograd(decoder: Decoder, adapter: Adapter, examples: Sequence[Example]) -> list[Tensor]:
    total = sum(float(e.mask[1:].sum()) for e in examples)
    for e in examples:
        batch = Batch.ragged([e.tokens], [decoder.widths], adapters=[adapter])
        logits = decoder.logits(decoder(batch))[:-1]
        losses = torch.nn.functional.cross_entropy(logits, e.tokens[1:], reduction="none")
        ((losses * e.mask[1:]).sum() / total).backward()
    return _taken(adapter)


def _taken(adapter: Adapter) -> list[Tensor]:
    out = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad(set_to_none=True)
    return out


@cache
def _under_load() -> tuple[Played, Played, list[float], list[float], float]:
    """The same requests without and with training; losses of that training and of it alone; adapters' distance."""
    decoder, count = tiny_decoder(), 24
    load_, _ = arrivals(20.0, 3.0, decoder.config)
    slo = SLO(ttft_s=10.0, tpot_s=1.0)
    alone = play(engine(decoder), load_, slo, 3.0)
    training = Training(trainer(decoder, count))
    losses: list[float] = []
    take = training.own.run

    def counted(num_tokens: int) -> Any:
        metrics = take(num_tokens)
        if metrics is not None:
            losses.append(metrics.loss)
        return metrics

    training.own.run = counted  # type: ignore[method-assign]
    beside = play(engine(decoder), load_, slo, 3.0, training=training, settings=CoServing(tpot_ms=20, ttft_ms=400))
    other = trainer(decoder, count)
    expected = [other.step().loss for _ in losses]
    while training.own.step_number < other.step_number or training.own.unit != "forward":
        training.run_unit(64)  # to the end of a step that had begun
    while other.step_number < training.own.step_number:
        other.step()
    pairs = zip(training.own.adapter.parameters(), other.adapter.parameters(), strict=True)
    distance = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return alone, beside, losses[: len(expected)], expected, distance


def same_curve() -> Figure:
    """An adapter trained under load against the same trained alone, float32."""
    _, _, losses, expected, distance = _under_load()
    return Figure(
        name="loss of an adapter trained under load against alone, same data order: largest difference",
        value=max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        unit="nats",
        op="<=",
        bar=1e-4,
        note=f"{len(losses)} optimizer steps on the tiny model; parameters then differ by {distance:.1e} at most",
    )


def same_answers() -> Figure:
    """Greedy tokens with and without finetuning beside."""
    alone, beside, *_ = _under_load()
    equal = sum(a == b for a, b in zip(alone.answers, beside.answers, strict=True))
    return Figure(
        name="greedy answers equal with and without finetuning beside",
        value=100 * equal / len(alone.answers),
        unit="%",
        op="==",
        bar=100,
        note=f"{len(alone.answers)} requests of the tiny model, {beside.trained:.0f} tokens a second trained beside",
    )
