"""Peak memory of elastic training steps on SmolLM2 in a process of its own: prints bytes.

`python -m benchmarks.training_memory RANK`, 0 for all weights.
"""

from __future__ import annotations

import copy
import sys

import torch

from benchmarks import smollm2
from benchmarks.convert_memory import status
from flextron.elastic.adapter import ElasticAdapter, sharing
from flextron.spec import SearchSpace
from flextron.texts.blocks import TokenBlocks
from flextron.training.recipe import TrainRecipe
from flextron.training.trainer import TrainingRun

__all__ = ["main", "training_run"]


def training_run(rank: int, *, full_only: bool = False, sequences: int = 2) -> TrainingRun:
    """Elastic training of SmolLM2 on random tokens, as the demo does it; of low rank, or of all weights for rank 0."""
    ours = smollm2.decoder()
    config = ours.config
    ratios = (1.0,) if full_only else (0.25, 0.5, 0.75, 1.0)
    space = SearchSpace.from_ratios(
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        num_groups=config.num_groups,
        ratios=ratios,
        multiple_of=64,
    )
    tokens = torch.randint(0, config.vocab_size, (sequences * 256,), generator=torch.Generator().manual_seed(0))
    blocks = TokenBlocks.from_tokens(tokens.int().numpy(), context=256)
    recipe = TrainRecipe(
        tokens=100_000,
        batch_size=sequences,
        micro_batch_size=sequences,
        sampling="random",
        full_probability=1.0 if full_only else 0.2,
        lora_rank=rank or None,
    )
    if not rank:
        return TrainingRun(ours.train(), copy.deepcopy(ours), space, blocks, recipe)
    adapter = ElasticAdapter.fresh(ours, rank, rank)
    return TrainingRun(sharing(ours).train(), ours, space, blocks, recipe, adapter=adapter.lora)


def main() -> None:
    """Two steps, so that the optimizer has its moments; then the peak of the process, the imports taken off."""
    before = status("VmRSS")
    run = training_run(int(sys.argv[1]))
    for step in range(2):
        run.step(step)
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main()
