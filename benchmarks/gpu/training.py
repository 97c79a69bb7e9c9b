"""Rows of the GPU suite that train: elastic adapters alone, and finetuning beside serving."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from benchmarks.gpu.engine import core, prompt
from benchmarks.gpu.models import decoder, peer, setting, spec_of
from benchmarks.harness import Figure, interleaved, median, ratios
from flextron.elastic.adapter import ElasticAdapter, sharing
from flextron.engine.coserving import CoServing, CoServingScheduler
from flextron.finetuning.example import Example
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.lora import LoraTrainer, LoraTrainers
from flextron.finetuning.trainer import TrainingTask
from flextron.generation.sampling import SamplingParams
from flextron.model.device import wait_for
from flextron.spec import SearchSpace
from flextron.texts.blocks import TokenBlocks
from flextron.training.recipe import TrainRecipe
from flextron.training.trainer import TrainingRun

__all__ = ["beside_serving", "elastic_adapter"]

_RANK = 16


def _timed(step: Callable[[], object]) -> float:
    device = torch.device(setting().device)
    wait_for(device)
    start = time.perf_counter()
    step()
    wait_for(device)
    return time.perf_counter() - start


def elastic_adapter() -> Figure:
    """Elastic adapter training against peft and a teacher in transformers."""
    own = setting()
    sequences, context = own.training
    tokens = torch.randint(1, own.shape["vocab_size"], (sequences, context), generator=torch.Generator().manual_seed(0))
    run = _elastic_run(tokens)
    steps, theirs = iter(range(10**6)), _peer_step(tokens)
    jobs = {"ours": lambda: _timed(lambda: run.step(next(steps))), "peer": lambda: _timed(theirs)}
    times = interleaved(jobs, own.repeats)
    spread = median(ratios(times, "peer", "ours"))
    return Figure(
        name="elastic adapter training, tokens a second, against peft with a teacher in transformers",
        value=spread[1],
        unit="x",
        op=">=",
        bar=1.0,
        peer={"name": "transformers and peft, tokens/s", "value": tokens.numel() / median(times["peer"])[1]},
        spread=spread,
        note=f"{tokens.numel() / median(times['ours'])[1]:,.0f} tokens/s; {sequences} x {context}, rank {_RANK}; "
        "bf16 autocast beside float32 weights; ours in drawn sub-networks, KL on a quarter of the tokens and "
        "hidden states on all; the peer in the full network, KL on all",
    )


def _elastic_run(tokens: torch.Tensor) -> TrainingRun:
    ours = decoder(dtype=torch.float32)
    config, (sequences, context) = ours.config, tokens.shape
    space = SearchSpace.from_ratios(
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        num_groups=config.num_groups,
        ratios=(0.25, 0.5, 0.75, 1.0),
        multiple_of=32,
    )
    recipe = TrainRecipe(
        tokens=10**7,
        context=context,
        batch_size=sequences,
        micro_batch_size=sequences,
        sampling="random",
        lora_rank=_RANK,
        precision="bf16",
    )
    adapter = ElasticAdapter.fresh(ours, _RANK, _RANK)
    blocks = TokenBlocks.from_tokens(tokens.flatten().int().numpy(), context=context)
    return TrainingRun(sharing(ours).train(), ours, space, blocks, recipe, adapter=adapter.lora)


def _peer_step(tokens: torch.Tensor) -> Callable[[], None]:
    teacher = peer(dtype=torch.float32)
    student = LlamaForCausalLM(teacher.config).to(teacher.device)
    student.load_state_dict(teacher.state_dict())
    config = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(student, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, tokens = torch.optim.AdamW(trained, lr=1e-4, fused=True), tokens.to(teacher.device)

    def step() -> None:
        with torch.autocast(teacher.device.type, torch.bfloat16):
            with torch.no_grad():
                target = teacher(tokens, use_cache=False).logits
            logits = model(input_ids=tokens, use_cache=False).logits
        loss = F.kl_div(
            logits.flatten(0, 1).float().log_softmax(-1),
            target.flatten(0, 1).float().log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


class _Work:
    """A job whose steps never end."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self._trainer, self.num_tokens = trainer, 0
        self.progress = 0
        """Tokens of all units: each token counts once for each layer and pass."""

    @property
    def unit(self) -> str:
        return self._trainer.unit

    @property
    def num_left(self) -> int:
        return self._trainer.num_left

    def run_unit(self, num_tokens: int) -> None:
        self.progress += min(num_tokens, self.num_left)
        metrics = self._trainer.run(num_tokens)
        if metrics is not None:
            self.num_tokens += metrics.num_tokens


def _job() -> _Work:
    sequences, context = setting().training
    rows = [prompt(context, i) for i in range(4 * sequences)]
    task = TrainingTask(
        hyperparameters=Hyperparameters(n_epochs=1000, batch_size=sequences, rank=_RANK),
        examples=[Example(row, [1.0] * context) for row in rows],
        seed=0,
    )
    trainers = LoraTrainers(core().decoder, "random", pack_tokens=max(1024, context), saved_gb=20)
    return _Work(trainers(task))


def beside_serving() -> Figure:
    """Finetuning beside decoding: both rates over what each gets alone, and the objective."""
    own, batch = setting(), max(b for b in setting().batches if b <= 16)
    alone, units_alone = _finetuning_alone()
    decoding, work = _decoding_with(None, batch, 1.0), _job()
    both = _decoding_with(work, batch, 1e3 * decoding["tpot"])
    kept = work.progress / both["seconds"] / units_alone
    tokens = {name: found["tokens"] / found["seconds"] for name, found in (("alone", decoding), ("both", both))}
    share = kept + tokens["both"] / tokens["alone"]
    return Figure(
        name=f"finetuning beside {batch} sequences that decode: the sum of both rates over each alone",
        value=share,
        unit="x",
        op=">=",
        bar=1.0,
        peer={"name": "finetuning alone, tokens/s", "value": alone},
        note=f"finetuning {kept * alone:,.0f} tokens/s ({kept:.0%} of alone), serving {tokens['both']:,.0f} tokens/s "
        f"({tokens['both'] / tokens['alone']:.0%}); mean time per token {1e3 * both['tpot']:.2f} ms of an objective of "
        f"{1e3 * both['objective']:.2f} ms; {own.dtype}, rank {_RANK}",
    )


def _finetuning_alone() -> tuple[float, float]:
    """Tokens a second, and those of units, over a few steps after the first."""
    work = _job()

    def step() -> None:
        before = work.num_tokens
        while work.num_tokens == before:
            work.run_unit(work.num_left)

    step()
    tokens, progress = work.num_tokens, work.progress
    seconds = sum(_timed(step) for _ in range(setting().repeats))
    return (work.num_tokens - tokens) / seconds, (work.progress - progress) / seconds


def _decoding_with(work: _Work | None, batch: int, alone_ms: float) -> dict[str, float]:
    """Serve `batch` sequences for a while; tokens, seconds, mean time per token and its objective.

    Args:
        work: is done beside, if given.
        batch: sequences.
        alone_ms: milliseconds of an iteration that nothing runs beside.
    """
    engine, own = core(), setting()
    # a unit may take as long as an iteration, and with it an iteration twice its time
    settings = CoServing(tpot_ms=2 * alone_ms, max_unit_ms=alone_ms)
    scheduler = CoServingScheduler(engine, work or _job(), settings)
    network, num_tokens = engine.network(spec_of(1.0)), 8 * own.steps + 8
    requests = [
        engine.add(f"{i}", prompt(own.context, i), SamplingParams(max_tokens=num_tokens), network) for i in range(batch)
    ]
    while any(r.num_new > 1 for r in requests):
        scheduler.step()
    for _ in range(5):  # the graph, and what an iteration takes alone
        scheduler.step()
    done, start = sum(len(r.answer) for r in requests), time.perf_counter()
    if work is not None:
        work.progress = 0
    while engine.has_unfinished:
        scheduler.step()
        if work is not None and engine.has_unfinished:
            scheduler.fill(lambda: False)
    seconds = time.perf_counter() - start
    tokens = sum(len(r.answer) for r in requests) - done
    return {"tokens": tokens, "seconds": seconds, "tpot": seconds * batch / tokens, "objective": scheduler.objective}
