"""Training between iterations: what it may take, on a clock of the test's own, and that it changes no answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.engine import CoServing, CoServingScheduler, EngineCore, EngineSettings, Request, StepOutput
from flextron.errors import FlextronError
from flextron.finetuning.lora import LoraTrainer, LoraTrainers
from flextron.finetuning.trainer import StepMetrics, TrainingTask
from flextron.generation.generate import SamplingParams
from flextron.model.decoder import Decoder
from tests.finetuning.test_lora import CHOSEN, examples
from tests.random_decoders import ragged_specs, random_decoder

DECODER = random_decoder("llama")
PROMPT = [3, 1, 4, 1, 5]


@dataclass
class Clock:
    """Seconds that pass only when something is computed."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class TimedWork:
    """Endless training; a unit takes a fixed time and a time per token, other for each kind."""

    clock: Clock
    costs: dict[str, tuple[float, float]] = field(default_factory=lambda: {"up": (1e-3, 1e-4), "down": (2e-3, 2.5e-4)})
    left: int = 600
    kind: str = "up"
    units: list[tuple[float, float]] = field(default_factory=list)
    """When each began and ended."""
    num_tokens: int = 0

    @property
    def unit(self) -> str | None:
        return self.kind

    @property
    def num_left(self) -> int:
        return self.left

    def run_unit(self, num_tokens: int) -> None:
        assert 1 <= num_tokens <= self.left
        began, (fixed, a_token) = self.clock.now, self.costs[self.kind]
        self.clock.now += fixed + a_token * num_tokens
        self.units.append((began, self.clock.now))
        self.num_tokens += num_tokens
        self.left -= num_tokens
        if not self.left:
            self.left, self.kind = 600, "down" if self.kind == "up" else "up"


class TimedCore(EngineCore):
    """An engine whose iterations take as long as the test says."""

    def __init__(self, clock: Clock, decoder: Decoder = DECODER, **options: int) -> None:
        chosen = {"max_num_seqs": 8, "max_num_batched_tokens": 16} | options
        super().__init__(decoder, EngineSettings(kv_cache_gb=0.01, page_size=4, **chosen))  # type: ignore[arg-type]
        self.clock = clock

    def step(self) -> list[StepOutput]:
        outputs = super().step()
        if self.num_tokens:
            self.clock.now += 0.010 + 0.0005 * self.num_tokens
        return outputs

    def ask(self, num_tokens: int, prompt: list[int] = PROMPT) -> Request:
        params = SamplingParams(max_tokens=num_tokens)
        request = self.add(str(self.clock.now), prompt, params, self.network(DECODER.widths))
        request.arrived = self.clock.now
        return request


def tokens_of(coserving: CoServingScheduler, times: dict[Request, list[float]]) -> None:
    """One iteration and what training does after it; when tokens came."""
    for output in coserving.step():
        times.setdefault(output.request, []).append(coserving.core.clock.now)  # type: ignore[attr-defined]


def tpot(times: list[float]) -> float:
    return (times[-1] - times[0]) / (len(times) - 1)


def system(settings: CoServing, **options: int) -> tuple[Clock, TimedCore, TimedWork, CoServingScheduler]:
    clock = Clock()
    core, work = TimedCore(clock, **options), TimedWork(clock)
    return clock, core, work, CoServingScheduler(core, work, settings, now=clock)


def warm(coserving: CoServingScheduler) -> None:
    """Let the scheduler see what units take."""
    for _ in range(60):
        coserving.fill(lambda: False)


def test_an_idle_engine_trains_all_the_time_in_units_of_bounded_length() -> None:
    clock, _, work, coserving = system(CoServing(tpot_ms=30, max_unit_ms=20))
    warm(coserving)
    began, units = clock.now, len(work.units)
    for _ in range(100):
        coserving.fill(lambda: False)
    lengths = [b - a for a, b in work.units[units:]]
    assert clock.now - began == pytest.approx(sum(lengths))
    assert max(lengths) <= 0.0201
    assert sum(lengths) / len(lengths) > 0.015


@pytest.mark.parametrize("tpot_ms", [14.0, 20.0, 40.0])
def test_decoding_takes_the_objective_and_training_the_rest(tpot_ms: float) -> None:
    clock, core, _, coserving = system(CoServing(tpot_ms=tpot_ms, max_unit_ms=20))
    warm(coserving)
    requests = [core.ask(45) for _ in range(3)]
    times: dict[Request, list[float]] = {}
    began, trained = clock.now, coserving.seconds
    while core.has_unfinished:
        tokens_of(coserving, times)
        coserving.fill(lambda: False)
    for request in requests:
        assert tpot(times[request]) <= tpot_ms / 1e3
        # and what it leaves is not left lying about: an iteration takes 11.5 ms
        assert tpot(times[request]) >= max(0.0115, 0.85 * tpot_ms / 1e3 - 0.002)
        gaps = [b - a for a, b in zip(times[request], times[request][1:], strict=False)]
        assert max(gaps) <= 2 * tpot_ms / 1e3 + 0.0115
    if tpot_ms > 14:
        assert (coserving.seconds - trained) / (clock.now - began) > 0.7 * (1 - 11.5 / tpot_ms)


def test_units_are_learnt_beside_requests_that_never_pause() -> None:
    _, core, work, coserving = system(CoServing(tpot_ms=14, max_unit_ms=100))
    core.ask(45)
    while core.has_unfinished:
        coserving.step()
        if core.has_unfinished:
            coserving.fill(lambda: False)
    assert work.num_tokens > 100


def test_training_rests_while_prompts_wait() -> None:
    _, core, work, coserving = system(CoServing(tpot_ms=100, max_unit_ms=20))
    warm(coserving)
    core.ask(3, PROMPT * 8)  # three iterations
    units = len(work.units)
    for _ in range(2):
        assert not coserving.step()
        coserving.fill(lambda: False)
        assert len(work.units) == units
    assert coserving.step()
    coserving.fill(lambda: False)
    assert len(work.units) > units


def test_with_an_objective_for_the_first_token_prompts_leave_time() -> None:
    _, core, work, coserving = system(CoServing(tpot_ms=100, ttft_ms=200, max_unit_ms=20))
    warm(coserving)
    tokens_of(coserving, {})
    first = core.ask(2, PROMPT * 8)
    times: dict[Request, list[float]] = {}
    units = len(work.units)
    while core.has_unfinished:
        tokens_of(coserving, times)
        coserving.fill(lambda: False)
    assert len(work.units) > units
    assert times[first][0] - first.arrived <= 0.2


def test_somebody_who_waits_stops_the_filling_after_one_unit() -> None:
    _, core, work, coserving = system(CoServing(tpot_ms=1000, max_unit_ms=5))
    warm(coserving)
    core.ask(5)
    coserving.step()
    units = len(work.units)
    coserving.fill(lambda: True)
    assert len(work.units) == units + 1
    coserving.fill(lambda: False)
    assert len(work.units) > units + 20


def test_an_objective_below_the_iteration_leaves_nothing() -> None:
    _, core, work, coserving = system(CoServing(tpot_ms=5, max_unit_ms=20))
    warm(coserving)
    core.ask(30)
    units = len(work.units)
    while core.has_unfinished:
        coserving.step()
        if core.has_unfinished:
            coserving.fill(lambda: False)
    assert len(work.units) == units
    assert coserving.token_reserve.part > 0.1 > coserving.first_reserve.part


def _share_in_time(seed: int, tpot_ms: float, *, with_training: bool) -> float:
    """Of 30 requests."""
    clock, core, _, coserving = system(CoServing(tpot_ms=tpot_ms, max_unit_ms=15))
    rng = random.Random(seed)
    if with_training:
        warm(coserving)
    arrivals = sorted(clock.now + 8 * rng.random() for _ in range(30))
    times: dict[Request, list[float]] = {}

    def is_due() -> bool:
        return bool(arrivals) and arrivals[0] <= clock.now

    while arrivals or core.has_unfinished:
        while is_due():
            arrivals.pop(0)
            core.ask(rng.randint(2, 40), [rng.randrange(50) for _ in range(rng.randint(1, 24))])
        if core.has_unfinished:
            tokens_of(coserving, times)
        elif not with_training:
            clock.now = arrivals[0]
        if with_training:
            coserving.fill(is_due)
    assert len(times) == 30
    return sum(tpot(t) <= tpot_ms / 1e3 for t in times.values()) / 30


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), tpot_ms=st.floats(25, 80))
def test_random_arrivals_meet_what_inference_alone_would_meet(seed: int, tpot_ms: float) -> None:
    """Most of those that would be in time alone are in time beside training; all finish; nothing runs late for long."""
    alone, beside = (_share_in_time(seed, tpot_ms, with_training=w) for w in (False, True))
    assert beside >= alone - 0.1


def test_bad_objectives_are_refused() -> None:
    with pytest.raises(FlextronError, match="tpot_ms must be a number above 0"):
        CoServing(tpot_ms=0)
    with pytest.raises(FlextronError, match="max_unit_ms"):
        CoServing(max_unit_ms=float("nan"))


class LoraWork:
    """A trainer as work, until it has taken all its steps."""

    def __init__(self, trainer: LoraTrainer) -> None:
        self.trainer = trainer
        self.metrics: list[StepMetrics] = []

    @property
    def unit(self) -> str | None:
        return self.trainer.unit if self.trainer.step_number < self.trainer.num_steps else None

    @property
    def num_left(self) -> int:
        return self.trainer.num_left

    def run_unit(self, num_tokens: int) -> None:
        metrics = self.trainer.run(num_tokens)
        if metrics is not None:
            self.metrics.append(metrics)


def answers(work: LoraWork | None) -> list[list[int]]:
    """Of requests in several sub-networks, with training between the iterations or without."""
    rng = random.Random(2)
    core = EngineCore(DECODER, EngineSettings(kv_cache_gb=0.01, page_size=4, max_num_seqs=4, max_num_batched_tokens=8))
    coserving = None if work is None else CoServingScheduler(core, work, CoServing(tpot_ms=1e4, ttft_ms=1e5))
    requests = []
    for k, spec in enumerate(ragged_specs(DECODER.config, 3) * 3):
        prompt = [rng.randrange(50) for _ in range(rng.randint(1, 15))]
        requests.append(core.add(str(k), prompt, SamplingParams(max_tokens=12), core.network(spec)))
    while core.has_unfinished:
        (coserving or core).step()
        if coserving is not None:
            coserving.fill(lambda: rng.random() < 0.5)
    while work is not None and work.unit is not None:
        work.run_unit(rng.randint(1, 9))
    return [s.answer for s in requests]


def test_answers_and_adapter_are_those_of_each_alone() -> None:
    data = examples(6)
    task = TrainingTask(hyperparameters=CHOSEN, examples=data, seed=5)
    alone = LoraTrainers(DECODER, "base")(task)
    losses = [alone.step().loss for _ in range(alone.num_steps)]
    work = LoraWork(LoraTrainers(DECODER, "base")(task))
    assert answers(work) == answers(None)
    assert [m.loss for m in work.metrics] == pytest.approx(losses, abs=1e-4)
    for ours, theirs in zip(work.trainer.adapter.parameters(), alone.adapter.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-3)
