"""The quality suite: what elastic adapters cost to train, and what the one in the package is worth.

Losses are measured on text that nobody trained on; `FLEXTRON_DATA` names the folder that holds it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

import flextron
from benchmarks import smollm2
from benchmarks.harness import Figure, LeftOutError, interleaved_seconds, median, ratios, run_suite
from benchmarks.training_memory import training_run
from experiments.elastification.curve import texts
from flextron.api.packaged import boxed_adapter
from flextron.api.texts import needed
from flextron.evals.run import TaskScore, evaluate_tasks
from flextron.workflows.demo import default_model

__all__ = ["run"]

_RANK = 32
_TEXTS = ("wikitext-2", "lambada")
_TOKENS = 10_000
"""Of each text."""
_QUESTIONS = 400


def against_all_weights() -> Figure:
    """Training tokens a second of low rank, against training all weights elastically."""
    low, whole = training_run(_RANK, sequences=8), training_run(0, sequences=8)
    times = interleaved_seconds({"low": lambda: low.step(0), "whole": lambda: whole.step(0)}, 5)
    spread = median(ratios(times, "whole", "low"))
    return Figure(
        name=f"elastic training of rank {_RANK}, tokens a second, against all weights",
        value=spread[1],
        unit="x",
        op=">=",
        bar=1.2,
        peer={"name": "all weights, tokens/s", "value": 8 * 256 / median(times["whole"])[1]},
        spread=spread,
        note="SmolLM2, float32, 8 x 256 tokens in two random sub-networks",
    )


def against_peft() -> Figure:
    """Training tokens a second at full width, against transformers and peft."""
    ours = training_run(_RANK, full_only=True, sequences=4)
    peer = _peer_step(torch.from_numpy(ours.blocks.batch(0, 4).numpy()))
    times = interleaved_seconds({"ours": lambda: ours.step(0), "peer": peer}, 3)
    spread = median(ratios(times, "peer", "ours"))
    return Figure(
        name=f"training of rank {_RANK} at full width, tokens a second, against transformers + peft distillation",
        value=spread[1],
        unit="x",
        op=">=",
        bar=1.5,
        peer={"name": "transformers + peft, tokens/s", "value": 4 * 256 / median(times["peer"])[1]},
        spread=spread,
        note="float32, 4 x 256 tokens; ours has the KL on a quarter of the tokens and hidden-state distance on all",
    )


def _peer_step(tokens: torch.Tensor) -> Any:
    config = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    student: Any = get_peft_model(smollm2.peer(), config).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        with torch.no_grad(), student.disable_adapter():
            target = student(tokens, use_cache=False).logits
        logits = student(tokens, use_cache=False).logits
        log_p, log_q = (F.log_softmax(x.flatten(0, 1), -1) for x in (logits, target))
        F.kl_div(log_p, log_q, log_target=True, reduction="batchmean").backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory() -> Figure:
    """Peak memory of low rank, over that of all weights."""
    low, whole = (_peak(rank) for rank in (_RANK, 0))
    return Figure(
        name=f"peak memory of elastic training, rank {_RANK} over all weights",
        value=low / whole,
        unit="ratio",
        op="<=",
        bar=0.45,
        peer={"name": "all weights, MB", "value": whole / 1e6},
        note=f"SmolLM2, float32, 2 x 256 tokens as in the demo; rank {_RANK}: {low / 1e6:.0f} MB",
    )


def _peak(rank: int) -> int:
    command = [sys.executable, "-m", "benchmarks.training_memory", str(rank)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


@cache
def _boxed() -> dict[str, dict[str, dict[float, float]]]:
    """Losses with and without the packaged adapter: (`with` or `without`), text, target."""
    if "FLEXTRON_DATA" not in os.environ:
        raise LeftOutError("set FLEXTRON_DATA to a folder with wikitext-2 and eval-llm-foundry")
    model = flextron.load(default_model(), elastic=boxed_adapter())
    assert model.adapter is not None
    model.profile()
    specs = {t: model.space.full if t == 1 else model.select(latency=t) for t in (1.0, 0.75, 0.5)}
    held_out = texts(Path(os.environ["FLEXTRON_DATA"]), needed(model.tokenizer), _TOKENS)

    def losses() -> dict[str, dict[float, float]]:
        return {name: {t: held_out[name].loss(model.decoder, spec) for t, spec in specs.items()} for name in _TEXTS}

    trained = losses()
    model.adapter.add_to(model.decoder, -1)
    return {"with": trained, "without": losses()}


def _left(target: float, bar: float) -> Figure:
    found = _boxed()
    shares = {}
    for name in _TEXTS:
        before, after = found["without"][name], found["with"][name]
        shares[name] = (after[target] - before[1.0]) / (before[target] - before[1.0])
    worst = max(shares, key=lambda name: shares[name])
    return Figure(
        name=f"loss left at latency {target:g}, adapter in the package; the worse of WikiText-2 and LAMBADA",
        value=100 * shares[worst],
        unit="%",
        op="<=",
        bar=bar,
        note="untrained = 100 %, full network = 0 %; " + ", ".join(f"{n} {100 * s:.0f} %" for n, s in shares.items()),
    )


def left_at_three_quarters() -> Figure:
    """Loss left at 0.75."""
    return _left(0.75, 45)


def left_at_half() -> Figure:
    """Loss left at 0.5."""
    return _left(0.5, 40)


def full_network() -> Figure:
    """The full network with the adapter, against without."""
    found = _boxed()
    rises = {name: found["with"][name][1.0] - found["without"][name][1.0] for name in _TEXTS}
    return Figure(
        name="full network with the adapter against without: largest rise of the loss on WikiText-2 and LAMBADA",
        value=max(rises.values()),
        unit="nats",
        op="<=",
        bar=0.005,
        note=", ".join(f"{name} {rise:+.4f}" for name, rise in rises.items()),
    )


def piqa() -> Figure:
    """PIQA's accuracy in the full network with the adapter, below that without, in standard errors."""
    if "FLEXTRON_DATA" not in os.environ:
        raise LeftOutError("set FLEXTRON_DATA to a folder with eval-olmo")
    model = flextron.load(default_model(), elastic=boxed_adapter())
    assert model.adapter is not None
    folder = Path(os.environ["FLEXTRON_DATA"]) / "eval-olmo"

    def score() -> TaskScore:
        (measured,) = evaluate_tasks(model, {"full": model.space.full}, ["piqa"], data=folder, limit=_QUESTIONS)
        return next(s for s in measured.scores if s.metric == "acc")

    trained = score()
    model.adapter.add_to(model.decoder, -1)
    plain = score()
    assert plain.standard_error is not None
    return Figure(
        name="PIQA in the full network: accuracy lost by the adapter",
        value=(plain.value - trained.value) / plain.standard_error,
        unit="standard errors",
        op="<=",
        bar=1.0,
        peer={"name": "without the adapter", "value": plain.value},
        note=f"{_QUESTIONS} questions drawn at random, both times the same: {100 * trained.value:.1f} % with the "
        f"adapter, {100 * plain.value:.1f} +- {100 * plain.standard_error:.1f} % without",
    )


def jump() -> Figure:
    """Largest rise of the loss between latencies 0.05 apart, from 1.0 to 0.4."""
    model = flextron.load(default_model(), elastic=boxed_adapter())
    model.profile()
    targets = [1 - 0.05 * i for i in range(13)]
    losses = [model.frontier_point(t).loss for t in targets]
    rises = [b - a for a, b in pairwise(losses)]
    steepest = max(range(len(rises)), key=lambda i: rises[i])
    return Figure(
        name="frontier from latency 1.0 to 0.4: largest rise of log-perplexity between neighbours 0.05 apart",
        value=rises[steepest],
        unit="nats",
        op="<=",
        bar=0.25,
        note=f"between {targets[steepest]:.2f} and {targets[steepest + 1]:.2f}, on WikiText-2's validation text",
    )


def run() -> bool:
    """All figures of the suite."""
    torch.manual_seed(0)
    return run_suite(
        "quality",
        [
            against_all_weights,
            against_peft,
            memory,
            left_at_three_quarters,
            left_at_half,
            full_network,
            piqa,
            jump,
        ],
    )
