"""What each process of `benchmarks.scale.launch` does; the first writes what it found."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

import flextron
from benchmarks.convert_memory import status
from flextron.elastic.adapter import ElasticAdapter, sharing
from flextron.families.config import config_from_hf
from flextron.interrupts import Interrupted
from flextron.model.decoder import Decoder
from flextron.parallel.processes import Processes, leave
from flextron.spec import SearchSpace
from flextron.texts.blocks import TokenBlocks
from flextron.training.recipe import TrainRecipe
from flextron.training.run import TrainingRun


def history(model: str, recipe: dict[str, Any], run_directory: str | None = None, stop: int | None = None) -> Any:
    """Losses of each step of training an elastic checkpoint; with `stop`, Ctrl-C comes after that step."""

    def on_step(done: int, total: int, losses: dict[str, float]) -> None:
        if done == stop:
            os.kill(os.getpid(), signal.SIGINT)

    elastic = flextron.load(model)
    text = Path(model) / "text.txt"
    try:
        result = elastic.train(text, TrainRecipe(**recipe), run_directory=run_directory, on_step=on_step)
    except Interrupted:
        return []
    return [step["loss"] for step in result.history]


def medium_run(rank: int | None, **changes: Any) -> TrainingRun:
    """A run of a model of 24 million parameters, all of them in its layers but few."""
    config = config_from_hf(
        {
            "model_type": "llama", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
            "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1024, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False,
            "mlp_bias": False, "rope_theta": 10000.0,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = Decoder(config).requires_grad_(False)
    tokens = torch.randint(0, config.vocab_size, (64 * 64,), generator=torch.Generator().manual_seed(0))
    settings = {"tokens": 4096, "context": 64, "batch_size": 8, "sampling": "random", "full_probability": 1.0}
    recipe = TrainRecipe(**{**settings, **changes}, lora_rank=rank)
    space = SearchSpace.from_ratios(
        num_hidden_layers=6, intermediate_size=2048, num_groups=8, ratios=(0.5, 1.0), multiple_of=64
    )
    blocks = TokenBlocks.from_tokens(tokens.int().numpy(), context=recipe.context)
    if rank is None:
        return TrainingRun(decoder, copy.deepcopy(decoder), space, blocks, recipe)
    adapter = ElasticAdapter.fresh(decoder, rank, rank)
    return TrainingRun(sharing(decoder), decoder, space, blocks, recipe, adapter=adapter.lora)


def memory(rank: int | None) -> dict[str, int]:
    """Bytes of a process after two steps, the largest of all processes.

    `counted` are the shards of parameters and moments, `live` all tensors that are left between two steps, whoever
    holds them, `grown` what the process has grown by since a smaller run warmed it up, with what its allocator keeps.
    """
    medium_run(rank, context=8, tokens=64).step(0)
    _settle()
    before = status("VmRSS"), _bytes(_tensors())
    run = medium_run(rank)
    for step in range(2):
        run.step(step)
    _settle()
    held = [*run.module.parameters(), *(t for s in run.optimizer.state.values() for t in s.values())]
    found = [_bytes(held), _bytes(_tensors()) - before[1], status("VmRSS") - before[0]]
    largest = torch.tensor(found)
    if Processes.join().are_several:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return dict(zip(("counted", "live", "grown"), largest.tolist(), strict=True))


def _tensors() -> list[torch.Tensor]:
    """All tensors of the process."""
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of their storages here, each once."""
    local = [getattr(t, "_local_tensor", t) for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def _settle() -> None:
    """Let the allocator give back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


JOBS: dict[str, Callable[..., Any]] = {"history": history, "memory": memory}


def main() -> None:
    """Run a job."""
    job, options, answer = sys.argv[1:]
    found = JOBS[job](**json.loads(options))
    if Processes.join().is_first:
        temporary = Path(f"{answer}.tmp")
        temporary.write_text(json.dumps(found), encoding="utf-8")
        shutil.move(temporary, answer)
    leave()


if __name__ == "__main__":
    main()
