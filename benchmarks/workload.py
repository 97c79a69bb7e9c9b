"""What the serving suite runs: requests, an engine that decodes without end, and an engine that answers all at once."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import smollm2
from flextron.engine import EngineCore, EngineSettings
from flextron.generation.sampling import SamplingParams
from flextron.kernels.decoder import Weights
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["Decoding", "Request", "mixed_arrival", "offline", "requests"]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and how many tokens to generate."""

    prompt: list[int]
    num_tokens: int


def requests(count: int, *, prompts: tuple[int, int] = (16, 64), answers: tuple[int, int] = (8, 40)) -> list[Request]:
    """Requests with prompts from held-out prose, always the same ones.

    Args:
        count: how many.
        prompts: least and most tokens of a prompt.
        answers: least and most tokens to generate.
    """
    rng = random.Random("requests")
    text = smollm2.eval_sequences(count * 64, 64).tolist()
    return [Request(window[: rng.randint(*prompts)], rng.randint(*answers)) for window in text]


def _params(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0)


class Decoding:
    """An engine whose sequences are past their prompts and decode on and on, one sub-network each."""

    def __init__(
        self,
        decoder: Decoder,
        specs: Sequence[SubnetSpec],
        weights: Weights = "float32",
        *,
        screens_head: bool = False,
        adapts_threads: bool = False,
    ) -> None:
        """Read the prompts; by default the whole head is read for each token, as limits of bytes suppose."""
        settings = EngineSettings(weights=weights, screens_head=screens_head, adapts_threads=adapts_threads)
        self.core = EngineCore(decoder, settings)
        self._num_sequences = len(specs)
        for i, (spec, request) in enumerate(zip(specs, requests(len(specs), prompts=(32, 32)), strict=True)):
            self.core.add(str(i), request.prompt, _params(1024), self.core.network(spec))
        while any(s.num_new > 1 for s in self.core.scheduler):
            self.core.step()

    def step(self) -> float:
        """Seconds of one iteration, in which every sequence gets a token.

        Raises:
            RuntimeError: a sequence has ended.
        """
        start = time.perf_counter()
        outputs = self.core.step()
        seconds = time.perf_counter() - start
        if len(outputs) != self._num_sequences:
            raise RuntimeError(f"{len(outputs)} of {self._num_sequences} sequences decode; measure fewer steps")
        return seconds

    def step_seconds(self, steps: int = 5) -> float:
        """Median of a few iterations, after one that is not counted."""
        self.step()
        return statistics.median(self.step() for _ in range(steps))


def offline(core: EngineCore, asked: Sequence[Request]) -> tuple[float, list[list[int]]]:
    """Seconds for all requests in the full network, given at once, and the answers; nothing is left in the cache."""
    core.pool.forget()
    network = core.network(core.decoder.widths)
    start = time.perf_counter()
    running = [core.add(str(i), r.prompt, _params(r.num_tokens), network) for i, r in enumerate(asked)]
    while core.has_unfinished:
        core.step()
    return time.perf_counter() - start, [s.answer for s in running]


def mixed_arrival(core: EngineCore, asked: Sequence[Request], specs: Sequence[SubnetSpec]) -> list[list[int]]:
    """Answers of requests that arrive while others run, up to three an iteration, a sub-network each."""
    rng = random.Random("arrivals")
    running, waiting = [], list(zip(asked, specs, strict=True))[::-1]
    while waiting or core.has_unfinished:
        for _ in range(min(len(waiting), rng.randint(0, 3))):
            request, spec = waiting.pop()
            name = str(len(running))
            running.append(core.add(name, request.prompt, _params(request.num_tokens), core.network(spec)))
        core.step()
    return [s.answer for s in running]
