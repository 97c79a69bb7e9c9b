"""Arrivals, lengths, prompts and how they come together; all determined by the seed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flextron.bench.arrivals import arrival_times
from flextron.bench.lengths import Lengths, Limits, Sizes
from flextron.bench.plan import Arrivals, Load, make_plan
from flextron.bench.prompts import PromptMaker, token_counter
from flextron.errors import FlextronError
from tests.tiny import make_tiny_llama

COUNTS = st.integers(1, 5000)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_spread_of_their_distribution(burstiness: float) -> None:
    times = np.array(arrival_times(20_000, 8.0, burstiness=burstiness, seed=3))
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all()
    assert len(times) / times[-1] == pytest.approx(8.0, rel=0.05)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_poisson_counts_vary_as_they_should() -> None:
    times = arrival_times(20_000, 10.0, seed=1)
    counts = np.histogram(times, bins=np.arange(0, int(times[-1])))[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, rel=0.15)


def test_seeds_determine_arrivals() -> None:
    assert arrival_times(50, 2.0, seed=1) == arrival_times(50, 2.0, seed=1)
    assert arrival_times(50, 2.0, seed=1) != arrival_times(50, 2.0, seed=2)


@pytest.mark.parametrize("values", [(0, 1.0, 1.0), (1, 0.0, 1.0), (1, float("inf"), 1.0), (1, 1.0, -1.0)])
def test_impossible_arrivals_are_refused(values: tuple[int, float, float]) -> None:
    with pytest.raises(FlextronError, match="must be positive"):
        arrival_times(values[0], values[1], burstiness=values[2])


@pytest.mark.parametrize(
    ("text", "mean"), [("40", 40), ("10-30", 20), ("exponential:50", 50), ("lognormal:20:0.5", 20 * np.exp(0.125))]
)
def test_lengths_have_their_distribution(text: str, mean: float) -> None:
    draws = random.Random(0)
    lengths = [Lengths.parse(text).draw(draws) for _ in range(20_000)]
    assert np.mean(lengths) == pytest.approx(mean, rel=0.05)
    assert min(lengths) >= 1


@pytest.mark.parametrize(
    "text", ["", "x", "0", "-5", "9-3", "1-2-3", "normal:3", "lognormal:3", "uniform:1:2", "exponential:", "fixed:3"]
)
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(FlextronError, match="lengths"):
        Lengths.parse(text)


@given(prompt=COUNTS, output=COUNTS, limits=st.tuples(*[st.none() | st.integers(2, 3000)] * 3))
def test_clipping_keeps_to_the_limits_and_changes_nothing_within(
    prompt: int, output: int, limits: tuple[int | None, int | None, int | None]
) -> None:
    clipped = Limits(prompt=limits[0], output=limits[1], total=limits[2]).clip(Sizes(prompt=prompt, output=output))
    found = (clipped.prompt, clipped.output, clipped.prompt + clipped.output)
    assert all(limit is None or value <= limit for value, limit in zip(found, limits, strict=True))
    assert 1 <= clipped.prompt <= prompt
    assert 1 <= clipped.output <= output
    wanted = (prompt, output, prompt + output)
    if all(limit is None or value <= limit for value, limit in zip(wanted, limits, strict=True)):
        assert clipped == Sizes(prompt=prompt, output=output)


def test_prompts_have_their_length_and_are_their_own() -> None:
    make = PromptMaker(seed=1)
    prompts = [make(i, 40) for i in range(200)]
    assert {len(prompt.split()) for prompt in prompts} == {40}
    # no block of a prefix cache would be found again
    assert len({tuple(prompt.split()[:8]) for prompt in prompts}) == 200
    assert make(7, 40) == prompts[7] == PromptMaker(seed=1)(7, 40)
    assert PromptMaker(seed=2)(7, 40) != prompts[7]


def test_a_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    make = PromptMaker(seed=1, shared_prefix=16)
    words = [make(i, 40).split() for i in range(50)]
    assert len({tuple(w[:16]) for w in words}) == 1
    assert len({tuple(w[16:24]) for w in words}) == 50
    short = [make(i, 10).split() for i in range(2)]
    assert [len(w) for w in short] == [10, 10]
    assert short[0][:9] == short[1][:9] == words[0][:9]


@pytest.mark.parametrize("shared_prefix", [0, 20])
def test_prompts_have_their_length_in_tokens(tmp_path: Path, shared_prefix: int) -> None:
    from transformers import AutoTokenizer

    make_tiny_llama(tmp_path)
    make = PromptMaker(count=token_counter(str(tmp_path)), shared_prefix=shared_prefix)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    lengths = [64 + i for i in range(40)]
    found = [len(tokenizer(make(i, n))["input_ids"]) for i, n in enumerate(lengths)]
    # this tokenizer cuts most words in several tokens, so a few lengths are missed by a little
    assert np.abs(np.subtract(found, lengths)).max() <= 3
    assert np.equal(found, lengths).sum() >= 32
    assert len({make(i, 64) for i in range(40)}) == 40


def test_prompts_make_room_for_tokens_that_the_tokenizer_adds() -> None:
    make = PromptMaker(count=lambda text: 2 + len(text.split()))
    assert [len(make(i, n).split()) for i, n in enumerate((3, 10, 500))] == [1, 8, 498]


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlextronError, match=r"tokenizer\.json"):
        token_counter(str(tmp_path))


def test_plans_are_determined_and_mix_targets_and_lengths() -> None:
    load = Load(
        arrivals=Arrivals(rate=5.0),
        num_requests=400,
        prompt_tokens="5-50",
        output_tokens="exponential:30",
        targets=("1.0", "0.6"),
        limits=Limits(output=40),
        seed=4,
    )
    plan = make_plan(load, PromptMaker(seed=4))
    assert plan == make_plan(load, PromptMaker(seed=4))
    times = [request.scheduled_s for request in plan.requests]
    assert times == arrival_times(400, 5.0, seed=4)
    assert plan.offered_rate == pytest.approx(5.0, rel=0.2)
    assert all(len(request.prompt.split()) == request.sizes.prompt for request in plan.requests)
    full = sum(request.target == "1.0" for request in plan.requests)
    assert 150 < full < 250
    assert sum(request.target == "0.6" for request in plan.requests) == 400 - full
    assert max(request.sizes.output for request in plan.requests) == 40
    assert 0 < plan.num_clipped < 400


def test_without_rate_or_trace_there_are_no_times() -> None:
    plan = make_plan(Load(num_requests=2), PromptMaker())
    assert [request.scheduled_s for request in plan.requests] == [None, None]
    assert (plan.process, plan.offered_rate) == ("closed loop", None)


@pytest.mark.parametrize("target", ["0", "1.5", "fast", "nan", ""])
def test_targets_out_of_range_are_refused(target: str) -> None:
    with pytest.raises(FlextronError, match="target"):
        make_plan(Load(targets=("1.0", target)), PromptMaker())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rate": 1.0, "trace": Path("t.csv")}, "either a rate or a trace"),
        ({"rate": 1.0, "rescale": 2.0}, "need a trace"),
        ({"burstiness": 2.0}, "give --rate"),
    ],
)
def test_contradicting_arrivals_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(FlextronError, match=reason):
        Arrivals(**options)  # type: ignore[arg-type]
