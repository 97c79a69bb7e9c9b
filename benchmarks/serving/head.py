"""The head in eight bits that finds the likeliest token: speed, and whether tokens stay the same."""

from __future__ import annotations

from functools import cache

from benchmarks.harness import Figure, interleaved, median, ratios
from benchmarks.serving.models import PAUSE, ROUNDS, original
from benchmarks.workload import Decoding, requests
from flextron import SamplingParams
from flextron.engine import EngineCore, EngineSettings
from flextron.model.cost import num_parameters
from flextron.spec import SubnetSpec

__all__ = ["equal_tokens", "screened_head"]

_PROMPTS, _ANSWER = 80, 64


@cache
def _half() -> SubnetSpec:
    """Equal layers with half of the full network's bytes, or the next fewer."""
    config = original().config
    total = num_parameters(config, config.full_spec)
    widths = range(64, config.intermediate_size + 1, 64)
    groups = max(1, round(config.num_groups / 3))
    specs = [
        SubnetSpec.uniform(num_hidden_layers=config.num_hidden_layers, intermediate_size=w, num_groups=groups)
        for w in widths
    ]
    return max((s for s in specs if num_parameters(config, s) <= total / 2), key=lambda s: num_parameters(config, s))


def screened_head() -> Figure:
    """Decode at half the bytes, batch 1, greedy: with the eight-bit copy of the head against without."""
    cases = {f"{name}{'' if s else ', whole'}": (spec, s) for name, spec in _specs().items() for s in (True, False)}
    decodings = {name: Decoding(original(), [spec], screens_head=s) for name, (spec, s) in cases.items()}
    times = interleaved({name: d.step_seconds for name, d in decodings.items()}, ROUNDS, PAUSE)
    spread = median(ratios(times, "half, whole", "half"))
    full = median(ratios(times, "full, whole", "full"))[1]
    return Figure(
        name="decode at half the bytes, float32, greedy: the likeliest token by an eight-bit head, over the whole head",
        value=spread[1],
        unit="x",
        op=">=",
        bar=1.2,
        peer={"name": "whole head, tokens/s", "value": 1 / median(times["half, whole"])[1]},
        spread=spread,
        note=f"the full network {full:.2f}x; equal layers of half the bytes, the embedding counted",
    )


def _specs() -> dict[str, SubnetSpec]:
    return {"half": _half(), "full": original().config.full_spec}


def equal_tokens() -> Figure:
    """Greedy tokens with the eight-bit copy of the head against those with the whole head."""
    answers = {}
    for screens in (True, False):
        core = EngineCore(original(), EngineSettings(screens_head=screens, max_num_seqs=8, prefix_caching=False))
        running = []
        for name, spec in _specs().items():
            for i, request in enumerate(requests(_PROMPTS, prompts=(16, 64))):
                params = SamplingParams(max_tokens=_ANSWER)
                running.append(core.add(f"{name}{i}", request.prompt, params, core.network(spec)))
        while core.has_unfinished:
            core.step()
        answers[screens] = [r.answer for r in running]
    pairs = [(a, b) for x, y in zip(answers[True], answers[False], strict=True) for a, b in zip(x, y, strict=True)]
    equal = sum(a == b for a, b in pairs)
    return Figure(
        name="greedy tokens with the eight-bit head that are those of the whole head",
        value=100 * equal / len(pairs),
        unit="%",
        op=">=",
        bar=99.9,
        note=f"{equal} of {len(pairs)} tokens, full network and half the bytes, up to eight answers at once",
    )
