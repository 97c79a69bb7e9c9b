"""A machine measured: the engine's iterations and units of finetuning of a model, timed here as they are served.

Requests with prompts and answers of many lengths run in groups of 1, 2, 4 and so on up to the engine's most. An
iteration's time is fitted by a line with bends over its tokens, and what attention adds by two slopes. Narrower
sub-networks have lines of their own.
"""

from __future__ import annotations

import random
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from flextron.api import ElasticModel
from flextron.engine import EngineCore, EngineSettings, Network
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.lora import UPDATE, LoraTrainers
from flextron.finetuning.trainer import TrainingTask
from flextron.finetuning.units import Stage
from flextron.generation.sampling import SamplingParams
from flextron.model.decoder import Decoder
from flextron.progress import OnProgress
from flextron.serving.ladder import fractions, rungs
from flextron.simulation.machine import Machine, NetworkTimes, TrainingTimes, UnitTime
from flextron.simulation.training import drawn_examples
from flextron.spec import SubnetSpec, Target

__all__ = ["measure", "measure_decoder"]

_ANSWER = 12
"""Tokens of the answers that are timed."""
_ITERATIONS = 64
"""Iterations that the prompts of a group may take."""
_UNIT_SIZES = (32, 128, 512)
_QUANTILES = 100
_LONGEST = 10.0
"""Largest factor of jitter."""
_OUTLIER = 2.0
"""Iterations that take more times as long as the fit were held up by something else."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """An iteration."""

    num_tokens: int
    keys: int
    """Keys that decoding requests attended to."""
    pairs: int
    """Pairs of a prompt's token and a key."""
    ms: float


def measure(
    model: ElasticModel, settings: EngineSettings | None = None, *, on_progress: OnProgress = lambda done, total: None
) -> Machine:
    """Time a model's engine and its finetuning on this machine, for simulations of it.

    Args:
        model: with a frontier of this device where its narrower sub-networks are to be known, too.
        settings: the engine's; prefixes are not shared while it is timed.
        on_progress: called with sub-networks done and in all.

    Raises:
        FlextronError: the engine cannot run as the settings ask.
    """
    wanted: list[tuple[float, float | None, SubnetSpec]] = [(1.0, None, model.space.full)]
    if model.frontier is not None:
        wanted[0] = (1.0, model.frontier.full.loss, model.space.full)
        for latency in rungs(fractions(p.latency for p in model.frontier.best()))[1:]:
            point = model.best(Target(latency=latency))
            wanted.append((latency, point.loss, point.spec))
    name = str(model.info.provenance.get("source", "")) or "model"
    return measure_decoder(model.decoder, wanted, name, settings, on_progress=on_progress)


def measure_decoder(
    decoder: Decoder,
    wanted: Sequence[tuple[float, float | None, SubnetSpec]],
    name: str,
    settings: EngineSettings | None = None,
    *,
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: OnProgress = lambda done, total: None,
) -> Machine:
    """Time some sub-networks of a decoder in the engine, and finetuning beside it.

    Args:
        decoder: the full, frozen model.
        wanted: latency targets with the losses, where they are known, and the sub-networks for them; the first is 1,
            the full one.
        name: the machine's.
        settings: the engine's.
        rounds: groups of each size.
        clock: what times are read from, in seconds.
        on_progress: called with sub-networks done and in all.
    """
    core = EngineCore(decoder, replace(settings or EngineSettings(), prefix_caching=False))
    full = core.network(wanted[0][2])
    networks, slopes, ratios = [], (0.0, 0.0), list[float]()
    for i, (latency, loss, spec) in enumerate(wanted):
        network = core.network(spec)
        share = network.num_blocks / max(1, full.num_blocks)
        samples = _samples(core, network, rounds, clock)
        points, found = _fit(samples, None if network is full else (slopes[0] * share, slopes[1] * share))
        slopes = found if network is full else slopes
        networks.append(NetworkTimes(latency=latency, loss=loss, kv_share=max(share, 1e-3), points=points))
        ratios += [s.ms / _expected(networks[-1], found, s) for s in samples]
        on_progress(i + 1, len(wanted))
    return Machine(
        name=name,
        source=f"measured with {torch.get_num_threads()} threads",
        networks=tuple(networks),
        kv_cache_tokens=core.pool.num_blocks // full.num_blocks * core.settings.page_size,
        context=decoder.config.max_position_embeddings,
        max_num_seqs=core.settings.max_num_seqs,
        max_num_batched_tokens=core.settings.max_num_batched_tokens,
        ms_per_1000_keys=slopes[0],
        ms_per_1000000_pairs=slopes[1],
        jitter=_spread(ratios),
        training=_training(core, full, clock),
    )


def _samples(core: EngineCore, network: Network, rounds: int, clock: Callable[[], float]) -> list[_Sample]:
    """Iterations of groups of requests; the first group warms the machine up and does not count."""
    rng, most = random.Random("measure"), core.settings.max_num_seqs
    sizes = [1 << k for k in range(most.bit_length()) if 1 << k < most] + [most]
    samples: list[_Sample] = []
    for k in range(rounds + 1):
        for size in sizes if k else sizes[:1]:
            found = _group(core, network, size, rng, clock)
            samples += found if k else []
    return samples


def _group(
    core: EngineCore, network: Network, size: int, rng: random.Random, clock: Callable[[], float]
) -> list[_Sample]:
    """Iterations of some requests, the first of which come one by one."""
    config, most = core.decoder.config, _ITERATIONS * core.settings.max_num_batched_tokens
    longest = min(min(core.capacity(network.spec), most) // size, config.max_position_embeddings) - _ANSWER
    waiting = [rng.randint(1, max(1, longest)) for _ in range(size)]
    samples = []
    while waiting or core.has_unfinished:
        if waiting:
            prompt = [rng.randrange(config.vocab_size) for _ in range(waiting.pop())]
            core.add(str(len(waiting)), prompt, SamplingParams(max_tokens=_ANSWER), network)
        before = {s: s.num_computed_tokens for s in core.scheduler}
        began = clock()
        core.step()
        ms = 1e3 * (clock() - began)
        keys = pairs = 0
        for request, start in before.items():
            # one that has ended keeps its count until its pages are gone: its last iteration had one token
            num_new = max(1, request.num_computed_tokens - start) if request.finish_reason is None else 1
            if num_new == 1:
                keys += start + 1
            else:
                pairs += num_new * start + num_new * (num_new + 1) // 2
        samples.append(_Sample(core.num_tokens, keys, pairs, ms))
    return samples


def _fit(
    samples: Sequence[_Sample], slopes: tuple[float, float] | None
) -> tuple[tuple[tuple[int, float], ...], tuple[float, float]]:
    """Points of the line with bends, and milliseconds a thousand keys and a million pairs, which may be given."""
    kept = list(samples)
    for _ in range(2):
        knots = _knots(sorted({s.num_tokens for s in kept}))
        rows, aims = [_hats(knots, s.num_tokens) for s in kept], [s.ms for s in kept]
        if slopes is None:
            rows = [[*row, s.keys / 1e3, s.pairs / 1e6] for row, s in zip(rows, kept, strict=True)]
        else:
            aims = [s.ms - slopes[0] * s.keys / 1e3 - slopes[1] * s.pairs / 1e6 for s in kept]
        found = _nonnegative(rows, aims, [s.ms for s in kept])
        own = (found[-2], found[-1]) if slopes is None else slopes
        line = NetworkTimes(latency=1.0, points=_rising(knots, found))
        kept = [s for s in kept if s.ms <= _OUTLIER * _expected(line, own, s)]
    return line.points, own


def _expected(line: NetworkTimes, slopes: tuple[float, float], sample: _Sample) -> float:
    return line.ms(sample.num_tokens) + slopes[0] * sample.keys / 1e3 + slopes[1] * sample.pairs / 1e6


def _spread(ratios: Sequence[float]) -> tuple[float, ...]:
    """Some quantiles, evenly spaced."""
    ordered = sorted(min(ratio, _LONGEST) for ratio in ratios)
    return tuple(round(ordered[int((i + 0.5) / _QUANTILES * len(ordered))], 3) for i in range(_QUANTILES))


def _rising(knots: Sequence[int], values: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Points none of which is lower than the one before."""
    return tuple(zip(knots, accumulate((max(v, 1e-6) for v in values), max), strict=False))


def _knots(sizes: Sequence[int]) -> list[int]:
    """Sizes at which the line may bend: each about half as large again as the one before; at least two."""
    knots = [sizes[0]]
    for size in sizes[1:-1]:
        if size >= 1.5 * knots[-1] and sizes[-1] >= 1.5 * size:
            knots.append(size)
    return [*knots, max(sizes[-1], knots[-1] + 1)]


def _hats(knots: Sequence[int], size: int) -> list[float]:
    """Weights of the knots in the value of a line with bends."""
    weights = [0.0] * len(knots)
    right = min(max(1, bisect_left(knots, size)), len(knots) - 1)
    share = (size - knots[right - 1]) / (knots[right] - knots[right - 1])
    weights[right - 1], weights[right] = 1 - share, share
    return weights


def _nonnegative(rows: Sequence[Sequence[float]], aims: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Least squares in errors relative to `sizes`; negative factors are left out, one after the other."""
    scales = 1 / torch.tensor(sizes, dtype=torch.float64)
    a, b = torch.tensor(rows, dtype=torch.float64) * scales[:, None], torch.tensor(aims, dtype=torch.float64) * scales
    used = list(range(a.shape[1]))
    while True:
        solved = torch.linalg.lstsq(a[:, used], b[:, None], driver="gelsd").solution[:, 0].tolist()
        worst = min(range(len(used)), key=solved.__getitem__)
        if solved[worst] >= 0:
            break
        del used[worst]
    found = dict(zip(used, solved, strict=True))
    return [found.get(i, 0.0) for i in range(a.shape[1])]


def _training(core: EngineCore, network: Network, clock: Callable[[], float]) -> TrainingTimes:
    """Times of units in some optimizer steps, of which the first warms the machine up.

    An iteration runs before each, as when it serves: what a unit needs is not in the processor's caches then.
    """
    decoder, config = core.decoder, core.decoder.config
    examples = drawn_examples("lognormal:120:0.7", min(512, config.max_position_embeddings), 0)
    task = TrainingTask(hyperparameters=Hyperparameters(n_epochs=1), examples=examples[:32], seed=0)
    trainer, rng = LoraTrainers(decoder, "measured")(task), random.Random("units")
    times: dict[str, list[tuple[int, float]]] = {kind: [] for kind in (*(s.value for s in Stage), UPDATE)}
    while trainer.step_number < 3:
        if not core.has_unfinished:
            core.add("beside", [0], SamplingParams(max_tokens=_ANSWER), network)
        core.step()
        kind, size = trainer.unit, min(rng.choice(_UNIT_SIZES), trainer.num_left)
        began = clock()
        trainer.run(size)
        if trainer.step_number:
            times[kind].append((size, 1e3 * (clock() - began)))
    units = {kind: _unit(found) for kind, found in times.items()}
    ratios = [
        ms / (units[kind].fixed_ms + units[kind].token_ms * size) for kind, found in times.items() for size, ms in found
    ]
    return TrainingTimes(num_layers=config.num_hidden_layers, jitter=_spread(ratios), **units)


def _unit(times: Sequence[tuple[int, float]]) -> UnitTime:
    """A straight line through times of one kind."""
    typical = statistics.median(ms / size for size, ms in times)
    kept = [(n, ms) for n, ms in times if ms <= 10 * typical * n]
    fixed, a_token = _nonnegative([[1.0, n] for n, _ in kept], [ms for _, ms in kept], [ms for _, ms in kept])
    return UnitTime(fixed, a_token)
