"""Metrics for Prometheus. They have vLLM's names, so that its dashboards work; those of sub-networks have their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flextron.serving.worker import Load

__all__ = ["Metrics", "Span"]

_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_NEXT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_WHOLE = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)


@dataclass(slots=True)
class Span:
    """When what happened to an answer, by `time.monotonic`."""

    arrived: float
    started: float
    """When it left the queue."""
    first: float
    """When its first token came."""
    num_tokens: int = 0


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(
        self, model_name: str, load: Callable[[], Load], cap: Callable[[], float], trained: Callable[[], int]
    ) -> None:
        """Start at 0.

        Args:
            model_name: a label of all series under vLLM's names.
            load: gives the engine's load when it is asked for.
            cap: gives the widest latency target of requests that allow a narrower one.
            trained: gives the tokens of finetuning so far.
        """
        self.registry = CollectorRegistry()
        self.registry.register(_LoadCollector(model_name, load, trained))

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            family = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return family.labels(model_name)

        self._name = model_name
        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.").labels(model_name)
        self._answer_tokens = counter("vllm:generation_tokens", "Tokens of answers.").labels(model_name)
        self._first = histogram("vllm:time_to_first_token_seconds", "From arrival, queueing included.", _FIRST)
        self._next = histogram("vllm:time_per_output_token_seconds", "Between two tokens of an answer.", _NEXT)
        self._between = histogram("vllm:inter_token_latency_seconds", "The same under vLLM's newer name.", _NEXT)
        self._queue = histogram("vllm:request_queue_time_seconds", "From arrival to the first iteration.", _WHOLE)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "From there to the first token.", _WHOLE)
        self._decode = histogram("vllm:request_decode_time_seconds", "From the first token to the last.", _WHOLE)
        self._prompt_length = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _LENGTHS)
        self._length = histogram("vllm:request_generation_tokens", "Tokens of an answer.", _LENGTHS)
        self._most = histogram("vllm:request_params_max_tokens", "Most tokens of an answer.", _LENGTHS)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE)
        labels = ["model_name", "finished_reason"]
        self._ends = Counter("vllm:request_success", "Answers, by why they ended.", labels, registry=self.registry)
        labels = ["model_name", "target"]
        self._requests = Counter("flextron:requests", "Answers begun, by target.", labels, registry=self.registry)
        self._tokens = Counter("flextron:tokens", "Tokens of answers, by target.", labels, registry=self.registry)
        text = "Answers of which some is by a narrower sub-network than asked."
        self._narrowed = counter("flextron:narrowed_requests", text).labels(model_name)
        text = "Widest latency target of those that allow less."
        gauge = Gauge("flextron:latency_cap", text, ["model_name"], registry=self.registry)
        gauge.labels(model_name).set_function(cap)

    def started(self, target: str, num_prompt_tokens: int, *, was_narrowed: bool) -> None:
        """Count an accepted request."""
        if was_narrowed:
            self.narrowed()
        self._prompt_tokens.inc(num_prompt_tokens)
        self._requests.labels(self._name, target).inc()

    def narrowed(self) -> None:
        """Count an answer that got a narrower sub-network than asked."""
        self._narrowed.inc()

    def token(self, target: str, seconds: float, *, is_first: bool) -> None:
        """Count a token: the time since the one before it, or for the first one since the request's arrival."""
        for histogram in [self._first] if is_first else [self._next, self._between]:
            histogram.observe(seconds)
        self._answer_tokens.inc()
        self._tokens.labels(self._name, target).inc()

    def ended(self, reason: str, seconds: float) -> None:
        """Count a request that ended, and the time since its arrival."""
        self._ends.labels(self._name, reason).inc()
        self._whole.observe(seconds)

    def completed(self, span: Span, ended: float, num_prompt_tokens: int, max_tokens: int) -> None:
        """An answer came to its end, whole."""
        self._queue.observe(span.started - span.arrived)
        self._prefill.observe(span.first - span.started)
        self._decode.observe(ended - span.first)
        self._prompt_length.observe(num_prompt_tokens)
        self._length.observe(span.num_tokens)
        self._most.observe(max_tokens)

    def text(self) -> bytes:
        """All series in Prometheus's text format."""
        return generate_latest(self.registry)


class _LoadCollector(Collector):
    """Reads the engine's load at the moment of a scrape."""

    def __init__(self, model_name: str, load: Callable[[], Load], trained: Callable[[], int]) -> None:
        self._name, self._load, self._trained = model_name, load, trained

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        gauges = {
            "vllm:num_requests_running": ("Requests that run.", load.num_running),
            "vllm:num_requests_waiting": ("Requests in the queue.", load.num_waiting),
            "vllm:kv_cache_usage_perc": ("Part of the KV cache in use; 1 is all.", load.kv_cache_usage),
        }
        counters = {
            "vllm:num_preemptions": ("Requests that gave way to others.", load.num_preemptions),
            "vllm:prefix_cache_queries": ("Tokens looked up in the cache.", load.num_prompt_tokens),
            "vllm:prefix_cache_hits": ("Tokens found in the cache.", load.num_cached_tokens),
            "vllm:spec_decode_num_draft_tokens": ("Tokens that were drafted.", load.num_drafted_tokens),
            "vllm:spec_decode_num_accepted_tokens": ("Drafted tokens that held.", load.num_accepted_tokens),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._name], value)
            yield gauge
        for name, (text, value) in counters.items():
            family = CounterMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._name], value)
            yield family
        trained = CounterMetricFamily("flextron:trained_tokens", "Tokens of finetuning.", labels=["model_name"])
        trained.add_metric([self._name], self._trained())
        yield trained
