"""Figures of serving on two ranks against one: the same answers, and what the ranks say to each other."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import torch

from benchmarks import smollm2
from benchmarks.harness import Figure
from flextron.engine import EngineCore, EngineSettings
from flextron.generation.sampling import SamplingParams
from flextron.model.adapter import Adapter
from flextron.spec import SearchSpace, SubnetSpec
from tests.model.adapter_cases import random_ia3, random_lora
from tests.ranks import Collectives

__all__ = ["collectives_of_layers", "same_answers"]

_REQUESTS, _RANKS = 64, 2


@torch.no_grad()
def _adapters() -> list[Adapter | None]:
    """None, LoRA beside all linears and beside some, and IA3; they change answers without drowning the model."""
    config = smollm2.decoder().config
    made = [random_lora(config, 8, 1), random_lora(config, 16, 2, targets=["q", "o", "down"]), random_ia3(config, 3)]
    for adapter in made:
        for name, p in adapter.named_parameters():
            p.copy_((p - 1) * 0.2 + 1 if name.endswith("factors") else p * 0.15)
    return [None, *(adapter.double() for adapter in made)]


def _specs(space: SearchSpace) -> list[SubnetSpec]:
    """The full network, narrow ones, and some whose layers differ and that skip layers."""
    rng = random.Random(0)
    return [
        space.full,
        space.uniform(512, 1),
        space.uniform(768, 2),
        *(space.heterogeneous(0.7, rng) for _ in range(5)),
    ]


@cache
def _measured() -> tuple[list[list[int]], list[list[int]], dict[str, Counter[str]]]:
    """Answers on one rank and on two; collectives of an iteration by kind, plain and adapted."""
    decoder = smollm2.decoder().double()
    config = decoder.config
    space = SearchSpace.from_ratios(
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        num_groups=config.num_groups,
        ratios=(0.33, 0.5, 0.67, 1.0),
        multiple_of=32,
        skippable_layers=(10, 12, 14, 16),
        max_skipped_layers=2,
    )
    specs, adapters, rng = _specs(space), _adapters(), random.Random(1)
    windows = smollm2.eval_sequences(_REQUESTS * 32, 32).tolist()
    asked = [
        (window[: rng.randint(4, 20)], rng.randint(4, 10), rng.choice(specs), rng.choice(adapters))
        for window in windows[:_REQUESTS]
    ]
    answers: dict[int, list[list[int]]] = {}
    counts: dict[str, Counter[str]] = {}
    for num_ranks in (1, _RANKS):
        settings = EngineSettings(kv_cache_gb=1, tensor_parallel=num_ranks, native=False if num_ranks == 1 else None)
        core = EngineCore(decoder, settings)
        requests = [
            core.add(
                str(i), prompt, SamplingParams(max_tokens=count, temperature=0.0), core.network(spec, None, adapter)
            )
            for i, (prompt, count, spec, adapter) in enumerate(asked)
        ]
        while core.has_unfinished:
            core.step()
        answers[num_ranks] = [r.answer for r in requests]
        if num_ranks > 1:
            counts = {
                "plain": _count(core, [(space.full, None)] * 4),
                "adapted": _count(core, [(space.full, adapter) for adapter in adapters]),
            }
        core.close()
    return answers[1], answers[_RANKS], counts


def _count(core: EngineCore, asked: list[tuple[SubnetSpec, Adapter | None]]) -> Counter[str]:
    """Collectives of an iteration that decodes."""
    for spec, adapter in asked:
        params = SamplingParams(max_tokens=3, temperature=0.0)
        core.add("counted", [1, 2, 3], params, core.network(spec, None, adapter))
    core.step()
    with Collectives() as found:
        core.step()
    while core.has_unfinished:
        core.step()
    return Counter(kind.strip("_") for kind, _ in found.calls)


def same_answers() -> Figure:
    """Greedy answers of mixed requests on two ranks."""
    alone, together, _ = _measured()
    assert len({tuple(answer) for answer in alone}) > _REQUESTS / 2
    differing = sum(a != b for a, b in zip(alone, together, strict=True))
    return Figure(
        name=f"{_REQUESTS} greedy requests, 8 sub-networks, 3 adapters and none: answers on 2 ranks that differ",
        value=differing,
        unit="answers",
        op="==",
        bar=0,
        peer={"name": "one rank, tokens", "value": sum(map(len, alone))},
        note="SmolLM2-135M in float64 on gloo, its 3 attention groups on 2 ranks; both by PyTorch's operators",
    )


def collectives_of_layers() -> Figure:
    """Collectives of an iteration on two ranks."""
    _, _, counts = _measured()
    layers = smollm2.pretrained().hf_config["num_hidden_layers"]
    plan = counts["adapted"]["broadcast"]
    others = counts["adapted"].total() - counts["adapted"]["allreduce"] - plan
    assert others == 0, counts
    return Figure(
        name="an iteration on 2 ranks with adapters: collectives a layer",
        value=counts["adapted"]["allreduce"] / layers,
        unit="sums",
        op="<=",
        bar=2,
        peer={"name": "without adapters", "value": counts["plain"]["allreduce"] / layers},
        note=f"counted at PyTorch's dispatcher; beside them {plan} broadcast an iteration, the plan, and none for the "
        "head, which is whole",
    )
