"""Metrics for Prometheus. They have vLLM's names, so that its dashboards work; those of sub-networks have their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flextron.serving.worker import Load

__all__ = ["Metrics"]

_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_NEXT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_WHOLE = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)


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

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return family.labels(model_name)

        self._name = model_name
        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.").labels(model_name)
        self._answer_tokens = counter("vllm:generation_tokens", "Tokens of answers.").labels(model_name)
        self._first = histogram("vllm:time_to_first_token_seconds", "From arrival, queueing included.", _FIRST)
        self._next = histogram("vllm:time_per_output_token_seconds", "Between two tokens of an answer.", _NEXT)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE)
        labels = ["model_name", "finished_reason"]
        self._ends = Counter("vllm:request_success", "Answers, by why they ended.", labels, registry=self.registry)
        self._requests = Counter("flextron:requests", "Answers begun, by target.", ["target"], registry=self.registry)
        self._tokens = Counter("flextron:tokens", "Tokens of answers, by target.", ["target"], registry=self.registry)
        self._narrowed = Counter(
            "flextron:narrowed_requests", "Answers begun in a narrower sub-network than asked.", registry=self.registry
        )
        gauge = Gauge("flextron:latency_cap", "Widest latency target of those that allow less.", registry=self.registry)
        gauge.set_function(cap)

    def started(self, target: str, num_prompt_tokens: int, *, was_narrowed: bool) -> None:
        """Count an accepted request."""
        self._narrowed.inc(was_narrowed)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._requests.labels(target).inc()

    def token(self, target: str, seconds: float, *, is_first: bool) -> None:
        """Count a token: the time since the one before it, or for the first one since the request's arrival."""
        (self._first if is_first else self._next).observe(seconds)
        self._answer_tokens.inc()
        self._tokens.labels(target).inc()

    def ended(self, reason: str, seconds: float) -> None:
        """Count a request that ended, and the time since its arrival."""
        self._ends.labels(self._name, reason).inc()
        self._whole.observe(seconds)

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
        yield CounterMetricFamily("flextron:trained_tokens", "Tokens of finetuning.", self._trained())
