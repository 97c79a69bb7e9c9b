"""What will be sent and when, laid down before the first request goes out.

Prompts are made here and not on the way, so that making them cannot delay a request.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flextron.bench.arrivals import arrival_times
from flextron.bench.dataset import Draft, read_dataset
from flextron.bench.lengths import Lengths, Limits, Sizes
from flextron.bench.traces import read_trace, slice_trace
from flextron.errors import FlextronError

__all__ = ["Arrivals", "Load", "Plan", "Request", "make_plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request to be sent."""

    index: int
    """Place in the order of arrival."""
    scheduled_s: float | None
    """Seconds after the start; None where it goes out as soon as an earlier one is done."""
    prompt: str
    sizes: Sizes
    """Tokens asked for; those of the prompt are approximate without a tokenizer."""
    target: str | None = None
    """Suffix of the model's name."""


_MOST_REQUESTS = 1_000_000
"""All prompts of a load are in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """Which arrival process it is: `rate`, `trace`, or neither for a closed loop."""

    rate: float | None = None
    """Requests per second."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of gaps; 1 is Poisson."""
    trace: Path | None = None
    """Recorded arrival times and lengths."""
    trace_start: float = 0.0
    """Seconds after the trace's first request."""
    trace_seconds: float | None = None
    """Seconds of the trace's own time; to its end by default."""
    rescale: float = 1.0
    """Factor on the trace's rate."""

    def __post_init__(self) -> None:
        """Refuse two processes at once."""
        if self.rate is not None and self.trace is not None:
            raise FlextronError("give either a rate or a trace; a trace is made faster or slower with --rescale")
        if self.trace is None and (self.trace_start, self.trace_seconds, self.rescale) != (0.0, None, 1.0):
            raise FlextronError("a slice and a rescaling need a trace; give --trace")
        if self.rate is not None and not self.rate >= 1e-4:
            raise FlextronError(f"the rate must be at least 0.0001 requests a second, not {self.rate:g}")
        if self.rate is None and self.burstiness != 1.0:
            raise FlextronError("burstiness is of drawn arrivals; give --rate")


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """All that determines the requests."""

    arrivals: Arrivals = field(default_factory=Arrivals)
    num_requests: int | None = None
    """100 by default; of a trace, all in the slice."""
    prompt_tokens: str = "256"
    """Distribution, see `Lengths.parse`; not used with a trace or a data set."""
    output_tokens: str = "128"
    """Output lengths in the same form; also used for texts of a data set that says nothing about answers."""
    dataset: Path | None = None
    """Lengths (`.csv` with `prompt_tokens,output_tokens`) or texts (`.jsonl` with `prompt`), also `.zst`."""
    targets: tuple[str, ...] = ()
    """Suffixes of the model's name, drawn with equal chances."""
    limits: Limits = field(default_factory=Limits)
    shared_prefix: int = 0
    """Tokens that all drawn prompts begin with."""
    tokenizer: str | None = None
    """Directory, file or hub id, for drawn prompts of exact lengths."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The requests, and what was done to get them."""

    requests: tuple[Request, ...]
    num_clipped: int
    """Requests that the limits shortened."""
    process: str
    """The arrival process, in words."""
    offered_rate: float | None
    """Requests per second from the first arrival to the last; None for a closed loop or a single arrival."""


def _check_target(target: str) -> str:
    try:
        if 0 < float(target) <= 1:
            return target
    except ValueError:
        pass
    raise FlextronError(f"a target is a fraction of the full model's latency, above 0 and at most 1, not {target!r}")


def _drafts(load: Load, num_requests: int) -> list[Draft]:
    """A length or text for each request; those of a data set in a drawn order, repeated if need be."""
    draws = random.Random(f"lengths {load.seed}")
    output = Lengths.parse(load.output_tokens)
    if load.dataset is None:
        prompt = Lengths.parse(load.prompt_tokens)
        return [Draft(sizes=Sizes(prompt=prompt.draw(draws), output=output.draw(draws))) for _ in range(num_requests)]
    found = read_dataset(load.dataset, output, draws)
    draws.shuffle(found)
    return [found[i % len(found)] for i in range(num_requests)]


def _arrivals(load: Load) -> tuple[list[float] | None, list[Draft], str]:
    """Times (None for a closed loop), lengths or texts, and the process in words."""
    arrivals = load.arrivals
    if arrivals.trace is not None:
        if load.dataset is not None:
            raise FlextronError("a trace brings its own lengths; give either a trace or a data set")
        entries = slice_trace(
            read_trace(arrivals.trace),
            start_s=arrivals.trace_start,
            seconds=arrivals.trace_seconds,
            rescale=arrivals.rescale,
        )[: load.num_requests]
        return [e.time_s for e in entries], [Draft(sizes=e.sizes) for e in entries], f"trace {arrivals.trace.name}"
    num_requests = 100 if load.num_requests is None else load.num_requests
    drafts = _drafts(load, num_requests)
    if arrivals.rate is None:
        return None, drafts, "closed loop"
    times = arrival_times(num_requests, arrivals.rate, burstiness=arrivals.burstiness, seed=load.seed)
    if arrivals.burstiness == 1.0:
        return times, drafts, f"Poisson, {arrivals.rate:g}/s"
    return times, drafts, f"gamma gaps of shape {arrivals.burstiness:g}, {arrivals.rate:g}/s"


def make_plan(load: Load, make_prompt: Callable[[int, int], str]) -> Plan:
    """Lay down all requests; equal loads and makers give equal plans.

    Args:
        load: what is asked, and when.
        make_prompt: makes the text of a request from its index and its number of tokens.

    Raises:
        FlextronError: a value is out of range, a file is broken, or options contradict each other.
    """
    if load.num_requests is not None and load.num_requests > _MOST_REQUESTS:
        raise FlextronError(f"at most {_MOST_REQUESTS:,} requests are planned at once, not {load.num_requests:,}")
    if load.num_requests is not None and load.num_requests < 1:
        raise FlextronError(f"the number of requests must be positive, not {load.num_requests}")
    targets = tuple(_check_target(target) for target in load.targets)
    times, drafts, process = _arrivals(load)
    draws = random.Random(f"targets {load.seed}")
    requests = []
    for index, draft in enumerate(drafts):
        sizes = load.limits.clip(draft.sizes)
        text = make_prompt(index, sizes.prompt) if draft.text is None else draft.text
        if draft.text is not None and sizes.prompt < draft.sizes.prompt:
            text = " ".join(text.split()[: sizes.prompt])
        requests.append(
            Request(
                index=index,
                scheduled_s=None if times is None else times[index],
                prompt=text,
                sizes=sizes,
                target=draws.choice(targets) if targets else None,
            )
        )
    clipped = sum(request.sizes != draft.sizes for request, draft in zip(requests, drafts, strict=True))
    span = times[-1] - times[0] if times else 0.0
    offered = (len(drafts) - 1) / span if span > 0 else None
    return Plan(requests=tuple(requests), num_clipped=clipped, process=process, offered_rate=offered)
