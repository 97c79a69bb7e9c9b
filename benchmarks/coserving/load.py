"""What the co-serving suite runs: a recorded load on an engine, with training beside it in one way or another."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path

from flextron.bench.traces import read_trace, slice_trace
from flextron.engine import CoServing, CoServingScheduler, EngineCore, EngineSettings, Request, StepOutput
from flextron.finetuning.example import Example
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.lora import UPDATE, LoraTrainer, LoraTrainers
from flextron.finetuning.trainer import TrainingTask
from flextron.generation.sampling import SamplingParams
from flextron.model.config import DecoderConfig
from flextron.model.decoder import Decoder

__all__ = [
    "SLO",
    "Arrival",
    "Played",
    "Training",
    "arrivals",
    "endless",
    "engine",
    "objectives",
    "play",
    "train_alone",
    "trainer",
]

_SCALE = 8
"""Lengths of the trace are divided by this: its median prompt has 1,000 tokens, two seconds of this machine."""
_MOST_PROMPT, _MOST_ANSWER = 192, 48
_TRACE_SECONDS = 600.0
_PIECE = 512
"""Tokens of a pack: a sequence of ordinary length."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the load."""

    time_s: float
    prompt: list[int]
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SLO:
    """Objectives of every request."""

    ttft_s: float
    tpot_s: float


@dataclass
class Played:
    """What a load got."""

    slo: SLO
    asked: list[float] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=list)
    """Of each request's tokens."""
    answers: list[list[int]] = field(default_factory=list)
    trained: float = 0.0
    """Tokens a second, forward and backward, while requests arrived."""
    busy: float = 0.0
    """Share of that time in which the engine computed."""
    iterations: list[tuple[int, float]] = field(default_factory=list)
    """Tokens and seconds of each."""

    @property
    def attainment(self) -> float:
        """Share of the requests that met both objectives."""
        return sum(self._met(a, t) for a, t in zip(self.asked, self.times, strict=True)) / max(1, len(self.asked))

    def _met(self, asked: float, times: Sequence[float]) -> bool:
        tpot = (times[-1] - times[0]) / max(1, len(times) - 1)
        return times[0] - asked <= self.slo.ttft_s and tpot <= self.slo.tpot_s


def arrivals(rate: float, seconds: float, config: DecoderConfig, seed: int = 0) -> tuple[list[Arrival], str]:
    """Requests at a mean rate, and where their times and lengths come from.

    The trace named by `FLEXTRON_TRACE` (Azure's conversation trace, or one of BurstGPT), from its beginning, played so
    fast that the rate comes out; without one, a Poisson process with lengths spread like that trace's.
    """
    rng = random.Random(f"load {seed}")
    path = os.environ.get("FLEXTRON_TRACE")
    if path:
        found = slice_trace(read_trace(Path(path)), start_s=seed * 60.0, seconds=_TRACE_SECONDS)
        own = len(found) / _TRACE_SECONDS
        chosen = [(e.time_s * own / rate, e.sizes.prompt / _SCALE, e.sizes.output / _SCALE) for e in found]
        source = f"{Path(path).name.partition('.')[0]}, first ten minutes, lengths over {_SCALE}"
    else:
        now, chosen = 0.0, []
        while now < seconds:
            now += rng.expovariate(rate)
            chosen.append((now, rng.lognormvariate(4.6, 0.9), rng.lognormvariate(3.0, 0.8)))
        source = "Poisson, log-normal lengths (FLEXTRON_TRACE names a recorded load)"
    out = []
    for at, prompt, answer in chosen:
        if at < seconds:
            num_tokens = min(max(2, round(answer)), _MOST_ANSWER)
            size = min(max(1, round(prompt)), _MOST_PROMPT, config.max_position_embeddings - num_tokens)
            out.append(Arrival(at, [rng.randrange(config.vocab_size) for _ in range(size)], num_tokens))
    return out, source


def engine(decoder: Decoder, **options: int) -> EngineCore:
    """Iterations so small that one with part of a prompt is within the objective, too."""
    chosen = {"max_num_seqs": 16, "max_num_batched_tokens": 16} | options
    return EngineCore(decoder, EngineSettings(kv_cache_gb=0.5, prefix_caching=False, **chosen))  # type: ignore[arg-type]


def trainer(decoder: Decoder, count: int = 4096, seed: int = 0, batch_size: int = 4) -> LoraTrainer:
    """Of rank 16 beside all linears, on conversations of many lengths that are learnt from their second half on."""
    rng = random.Random(f"examples {seed}")
    vocab = decoder.config.vocab_size
    examples = []
    for _ in range(count):
        n = min(max(16, round(rng.lognormvariate(4.8, 0.7))), min(_PIECE, decoder.config.max_position_embeddings - 1))
        examples.append(Example([rng.randrange(vocab) for _ in range(n)], [int(i >= n // 2) for i in range(n)]))
    chosen = Hyperparameters(n_epochs=1000, batch_size=batch_size, rank=16)
    return LoraTrainers(decoder, "bench", pack_tokens=_PIECE)(
        TrainingTask(hyperparameters=chosen, examples=examples, seed=seed)
    )


class Training:
    """Endless work for a `CoServingScheduler`, that counts what it does in tokens that went both ways."""

    def __init__(self, own: LoraTrainer) -> None:
        """Take a trainer."""
        self.own, self.num_tokens = own, 0.0
        self._shares = {"forward": 0.5, "backward": 0.5, "head": 0.0, UPDATE: 0.0}
        self._layers = own.adapter.config.num_hidden_layers

    @property
    def unit(self) -> str:
        """See `Work`."""
        return self.own.unit

    @property
    def num_left(self) -> int:
        """See `Work`."""
        return self.own.num_left

    def run_unit(self, num_tokens: int) -> None:
        """See `Work`; half of a token is counted on each way, spread over the layers."""
        size = min(num_tokens, self.own.num_left)
        self.num_tokens += self._shares[self.own.unit] * size / self._layers
        self.own.run(num_tokens)

    def run_step(self) -> None:
        """A whole optimizer step."""
        before = self.own.step_number
        while self.own.step_number == before:
            self.run_unit(512)


def train_alone(training: Training, seconds: float) -> float:
    """Tokens a second of training alone, in the longest units."""
    training.run_step()
    began, before = time.monotonic(), training.num_tokens
    while time.monotonic() - began < seconds:
        training.run_unit(512)
    return (training.num_tokens - before) / (time.monotonic() - began)


def play(
    core: EngineCore,
    load: Sequence[Arrival],
    slo: SLO,
    seconds: float,
    *,
    training: Training | None = None,
    settings: CoServing | None = None,
    steps_when_drained: int = 0,
    pause: Callable[[float], float] = lambda busy: 0.0,
) -> Played:
    """Play a load in real time.

    Args:
        core: an engine without requests.
        load: by time.
        slo: what is asked of each request.
        seconds: in which training counts; requests that run then are finished.
        training: beside it; by a `CoServingScheduler`, or `steps_when_drained` steps whenever nothing is served.
        settings: of the `CoServingScheduler`.
        steps_when_drained: temporal sharing: so many optimizer steps before requests are looked at again.
        pause: seconds to rest after temporal sharing's training of so many seconds, for a smaller share.
    """
    played = Played(slo)
    coserving = None if training is None or steps_when_drained else CoServingScheduler(core, training, settings)
    network = core.network(core.decoder.widths)
    index: dict[Request, int] = {}
    waiting = list(load)[::-1]
    resume_at = 0.0
    began = time.monotonic()
    if training is not None:
        training.num_tokens = 0.0

    def is_due() -> bool:
        return bool(waiting) and began + waiting[-1].time_s <= time.monotonic()

    while waiting or core.has_unfinished or time.monotonic() - began < seconds:
        while is_due():
            arrival = waiting.pop()
            params = SamplingParams(max_tokens=arrival.num_tokens)
            sequence = core.add(str(len(index)), arrival.prompt, params, network)
            sequence.arrived = began + arrival.time_s
            index[sequence] = len(played.asked)
            played.asked.append(sequence.arrived)
            played.times.append([])
        in_window = time.monotonic() - began < seconds
        if core.has_unfinished:
            start = time.monotonic()
            outputs: list[StepOutput] = (coserving or core).step()
            now = time.monotonic()
            played.busy += (now - start) / seconds if in_window else 0.0
            played.iterations.append((core.num_tokens, now - start))
            for output in outputs:
                played.times[index[output.request]].append(now)
        if training is not None and in_window:
            played.trained = training.num_tokens / seconds
        if coserving is not None:
            coserving.fill(is_due)
        elif not core.has_unfinished:
            now = time.monotonic()
            if training is not None and in_window and now >= resume_at:
                for _ in range(steps_when_drained):
                    training.run_step()
                ended = time.monotonic()
                resume_at = ended + pause(ended - now)
            else:
                ahead = [began + waiting[-1].time_s] if waiting else []
                until = min([*ahead, resume_at if training else began + seconds, began + seconds])
                time.sleep(max(0.0, min(0.01, until - now)))
    played.answers = [s.answer for s in sorted(index, key=index.__getitem__)]
    if training is not None:
        played.trained = min(played.trained, training.num_tokens / seconds)
    return played


def objectives(core: EngineCore, tpot_factor: float, ttft_factor: float) -> tuple[SLO, float]:
    """From the time per token of a request that is alone; that time, too, in seconds."""
    sequence = core.add("alone", [1, 2, 3, 4], SamplingParams(max_tokens=40), core.network(core.decoder.widths))
    times = []
    while core.has_unfinished:
        core.step()
        times.append(time.monotonic())
    assert sequence.finish_reason is not None
    gaps = sorted(b - a for a, b in pairwise(times))
    alone = gaps[len(gaps) // 2]
    return SLO(ttft_s=ttft_factor * alone, tpot_s=tpot_factor * alone), alone


def endless(items: Sequence[Arrival]) -> list[Arrival]:
    """The same requests at once, for the engine's capacity."""
    return [Arrival(0.0, a.prompt, a.num_tokens) for a, _ in zip(cycle(items), range(48), strict=False)]
