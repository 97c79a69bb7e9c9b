"""The core suite: exactness, skipped work, training throughput, the demo's quality and speed, memory of `convert`."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks import smollm2
from benchmarks.families import worst_family_error
from benchmarks.harness import Figure, interleaved_seconds, median, run_suite
from flextron.checkpoints.weights import write_checkpoint
from flextron.elastic import extract, permute, rank
from flextron.model.batch import Batch
from flextron.model.cost import step_flops
from flextron.model.decoder import Decoder
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import SearchSpace, SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.recipe import TrainRecipe
from flextron.training.trainer import TrainingRun

__all__ = ["DEMO", "demo_record", "run"]


def families() -> Figure:
    """Every family against transformers."""
    error, worst, same_tokens = worst_family_error()
    return Figure(
        name="every family, tiny random model, against transformers: logits and gradients",
        value=error if same_tokens else math.inf,
        unit="relative",
        op="<=",
        bar=1e-5,
        peer={"name": "transformers (reference)", "value": 0.0},
        note=f"worst: {worst}; 32 greedy tokens {'equal' if same_tokens else 'DIFFER'} in all",
    )


def permuted_full() -> Figure:
    """SmolLM2: permuted full model against transformers' original."""
    tokens = smollm2.eval_sequences()
    ours = smollm2.decoder()
    permute(ours, rank(ours, tokens[:8]))
    theirs = smollm2.peer()
    difference, losses = 0.0, []
    with torch.no_grad():
        for chunk in tokens.split(4):
            a = ours.logits(ours(Batch.padded(chunk, ours.widths))).view(*chunk.shape, -1)
            b = theirs(chunk, use_cache=False).logits
            difference = max(difference, float((a - b).abs().max()))
            losses.append(F.cross_entropy(b[:, :-1].flatten(0, 1), chunk[:, 1:].flatten(), reduction="none"))
    perplexities = math.exp(mean_loss(ours, tokens, ours.widths)), math.exp(float(torch.cat(losses).mean()))
    equal = f"{perplexities[0]:.4g}" == f"{perplexities[1]:.4g}"
    return Figure(
        name="SmolLM2: permuted full model against the original: largest logit difference",
        value=difference if equal else math.inf,
        unit="",
        op="<=",
        bar=1e-3,
        peer={"name": "perplexity of transformers", "value": perplexities[1]},
        note=f"perplexity {perplexities[0]:.6g} against {perplexities[1]:.6g}",
    )


def four_forms() -> Figure:
    """Masked, sliced, extracted, and reloaded by stock transformers."""
    tokens = smollm2.eval_sequences(512)
    ours = smollm2.decoder()
    config = ours.config
    spec = SubnetSpec.uniform(num_hidden_layers=30, intermediate_size=768, num_groups=2, skip=(14, 25))
    batch = Batch.padded(tokens, spec)
    sliced = ours.logits(ours(batch)).detach()
    extracted = extract(ours, spec)
    forms = [extracted.logits(extracted(batch)), _masked(ours, spec, tokens)]
    with tempfile.TemporaryDirectory() as directory:
        source = smollm2.pretrained()
        write_checkpoint(extracted, Path(directory), hf_config=source.hf_config, tokenizer=None)
        stock = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            forms.append(stock(tokens, use_cache=False).logits.flatten(0, 1))
    scale = sliced.abs().max()
    return Figure(
        name="masked = sliced = extracted = reloaded by stock transformers (uniform): logits",
        value=max(float((form - sliced).abs().max() / scale) for form in forms),
        unit="relative",
        op="<=",
        bar=1e-5,
        peer={"name": "transformers (reference)", "value": 0.0},
        note=f"SmolLM2, MLP 768 of {config.intermediate_size}, 2 of {config.num_groups} groups, 28 of 30 layers",
    )


@torch.no_grad()
def _masked(ours: Decoder, spec: SubnetSpec, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' full model with the weights beyond the prefixes zeroed."""
    theirs = smollm2.peer()
    rows = ours.config.query_rows_per_group
    for layer, widths in zip(theirs.model.layers, spec.layers, strict=True):
        layer.mlp.down_proj.weight[:, widths.intermediate_size :] = 0
        layer.self_attn.o_proj.weight[:, widths.num_groups * rows :] = 0
    return theirs(tokens, use_cache=False).logits.flatten(0, 1)


def half_step() -> Figure:
    """Forward and backward of the layers at half width over full width, against the ratio of operations."""
    ours = smollm2.decoder()
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(not name.startswith("embedding"))
    tokens = torch.randint(0, ours.config.vocab_size, (4, 256))
    half = SubnetSpec.of([768] * 30, [1, 2] * 15)

    def step(spec: SubnetSpec) -> None:
        ours(Batch.padded(tokens, spec)).sum().backward()
        ours.zero_grad()

    times = interleaved_seconds({"full": lambda: step(ours.widths), "half": lambda: step(half)}, 7)
    flops = [step_flops(ours.config, spec, num_sequences=4, length=256) for spec in (half, ours.widths)]
    ideal = flops[0] / flops[1]
    ratios = [a / b / ideal for a, b in zip(times["half"], times["full"], strict=True)]
    spread = median(ratios)
    return Figure(
        name="forward + backward of the layers at half width over full width, over the ratio of operations",
        value=spread[1],
        unit="ratio",
        op="<=",
        bar=1.10,
        peer={"name": "ratio of operations", "value": ideal},
        spread=spread,
        note="SmolLM2, 1,024 tokens; 768 of 1,536 neurons, 1 or 2 of 3 groups in turn",
    )


class _FullOnly:
    """Draws the full network, as the peer trains it."""

    def __init__(self, spec: SubnetSpec) -> None:
        self._spec = spec

    def draw(self, step: int, micro_step: int, count: int) -> list[SubnetSpec]:
        """One network for the whole micro batch."""
        return [self._spec]


def throughput() -> Figure:
    """Training tokens per second at full width, against transformers and plain PyTorch distillation."""
    tokens = torch.randint(0, 49152, (4, 256))
    runs = {name: _our_run(tokens, kw) for name, kw in _RECIPES.items()}
    step = _peer_step(tokens)
    jobs = {name: (lambda run=run: run.step(0)) for name, run in runs.items()} | {"peer": step}
    times = interleaved_seconds(jobs, 3)
    ratios = {name: median([b / a for a, b in zip(times[name], times["peer"], strict=True)]) for name in runs}
    peer_rate = tokens.numel() / median(times["peer"])[1]
    return Figure(
        name="training throughput at full width, against transformers + plain PyTorch distillation",
        value=ratios["default"][1],
        unit="x",
        op=">=",
        bar=1.3,
        peer={"name": "transformers, tokens/s", "value": peer_rate},
        spread=ratios["default"],
        note=(
            "float32, 4 x 256 tokens, frozen embeddings, AdamW in both; by default ours has the KL on a quarter of "
            f"the tokens and hidden-state distance on all; with the KL on all tokens: {ratios['same loss'][1]:.2f}x"
        ),
    )


_RECIPES: dict[str, dict[str, float]] = {"default": {}, "same loss": {"kl_fraction": 1.0, "hidden_weight": 0.0}}


def _our_run(tokens: torch.Tensor, settings: dict[str, float]) -> TrainingRun:
    ours = smollm2.decoder()
    config = ours.config
    space = SearchSpace(
        num_hidden_layers=config.num_hidden_layers,
        intermediate_sizes=(config.intermediate_size,),
        num_groups=(config.num_groups,),
    )
    blocks = TokenBlocks.from_tokens(tokens.flatten().int().numpy(), context=256)
    recipe = TrainRecipe(tokens=100_000, batch_size=4, micro_batch_size=4, **settings)
    run = TrainingRun(ours, copy.deepcopy(ours), space, blocks, recipe)
    run.sampler = _FullOnly(space.full)  # type: ignore[assignment]
    ours.train()
    return run


def _peer_step(tokens: torch.Tensor):
    student, teacher = smollm2.peer().train(), smollm2.peer()
    student.get_input_embeddings().weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        with torch.no_grad():
            target = teacher(tokens, use_cache=False).logits
        logits = student(tokens, use_cache=False).logits
        loss = F.kl_div(
            F.log_softmax(logits.flatten(0, 1), -1),
            F.log_softmax(target.flatten(0, 1), -1),
            log_target=True,
            reduction="batchmean",
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


DEMO = Path("out/demo-from-scratch")


def demo_record() -> dict:
    """The record of the demo that converts and trains; runs it where it was not run yet."""
    command = [sys.executable, "-m", "flextron", "demo", "--from-scratch", "--output", str(DEMO), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((DEMO / "demo.json").read_text(encoding="utf-8"))


def demo_quality() -> Figure:
    """The demo: how much of the distance to the full model training leaves at target 0.75."""
    facts = demo_record()
    row = next(r for r in facts["rows"] if r["target"] == 0.75)
    others = ", ".join(
        f"{r['target']:g}: {r['perplexity_before']:.1f} to {r['perplexity_after']:.1f} ({r['gap_remaining']:.0%} left)"
        for r in facts["rows"]
    )
    return Figure(
        name="demo: distance to the full model's log-perplexity left after training, target 0.75",
        value=row["gap_remaining"],
        unit="of the untrained",
        op="<=",
        bar=0.5,
        peer={"name": "untrained, perplexity", "value": row["perplexity_before"]},
        note=f"{facts['trained_tokens']:,} tokens; perplexity before and after by target: {others}",
    )


def demo_speed() -> Figure:
    """The demo: measured decode speed-up at target 0.5."""
    row = next(r for r in demo_record()["rows"] if r["target"] == 0.5)
    return Figure(
        name="decode speed-up at target 0.5, batch 1",
        value=row["speed_up"],
        unit="x",
        op=">=",
        bar=1.8,
        peer={"name": "full model, ms", "value": row["latency_ms"] * row["speed_up"]},
        note=f"{row['latency_ms']:.1f} ms a token",
    )


def convert_memory() -> Figure:
    """Peak memory of `convert` on a sharded checkpoint, over model + 1 shard."""
    source = smollm2.sharded_checkpoint()
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.convert_memory", str(source)], capture_output=True, text=True, check=True
    )
    facts = json.loads(out.stdout.splitlines()[-1])
    allowed = facts["model_bytes"] + facts["largest_shard_bytes"]
    return Figure(
        name="peak memory of convert on a sharded checkpoint, over model + 1 shard",
        value=facts["peak_bytes"] / allowed,
        unit="ratio",
        op="<=",
        bar=1.0,
        peer={"name": "model + 1 shard, MB", "value": allowed / 1e6},
        note=f"peak {facts['peak_bytes'] / 1e6:.0f} MB above the process before; {facts['num_shards']} shards",
    )


def run() -> bool:
    """All figures of the suite."""
    torch.manual_seed(0)
    return run_suite(
        "core",
        [
            families,
            permuted_full,
            four_forms,
            half_step,
            throughput,
            demo_quality,
            demo_speed,
            convert_memory,
        ],
    )
