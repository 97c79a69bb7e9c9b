"""Self-speculative decoding: a narrow sub-network drafts tokens, the request's own network checks them in one pass.

The draft is nested in the network that checks it: the same weights, and the same pages. It reads the keys and values of
the tokens before, and writes its own to the positions ahead, where the checking pass overwrites them; so there is no
second model and no second cache. Nothing is lost: greedy answers are those without drafts, drawn answers have the same
distribution (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192).

Which sub-network drafts, and how many tokens, follows from what was measured so far: how often drafts were accepted,
and how long iterations took.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import get_args

import torch
from torch import Tensor

from flextron.engine.request import Chunk, Network, Request
from flextron.engine.runner import Runner, nested_network
from flextron.engine.scheduler import Scheduler
from flextron.engine.timing import TimeLine
from flextron.errors import FlextronError
from flextron.generation.sampling import SamplingParams, most_likely, probabilities, sample
from flextron.kernels.decoder import Weights
from flextron.model.adapter import Adapter
from flextron.spec import SubnetSpec

__all__ = ["Draft", "Speculation", "Speculator", "verified"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Speculation:
    """How to speculate."""

    drafts: tuple[SubnetSpec, ...]
    """Sub-networks that may draft; the best by measurement does."""
    weights: Weights = "float32"
    """Precision of the drafts. `int8` reads a quarter of the bytes, `int4` about a fifth, and each keeps a copy of that
    size in memory."""
    num_tokens: int | None = None
    """Tokens of a draft; chosen by measurement by default."""
    max_num_tokens: int = 8
    """Most tokens of a draft whose length is chosen."""
    max_num_seqs: int = 4
    """Most requests at once with which tokens are drafted; with more, the processor has no time to spare."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.weights not in get_args(Weights):
            raise FlextronError(f"drafts have weights in {' or '.join(get_args(Weights))}, not {self.weights!r}")
        if not self.drafts:
            raise FlextronError("speculation needs at least one sub-network that drafts")
        if min(self.max_num_tokens, self.max_num_seqs) < 1 or (self.num_tokens is not None and self.num_tokens < 1):
            raise FlextronError("num_tokens, max_num_tokens and max_num_seqs of speculation must be at least 1")


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may follow a request."""

    tokens: list[int]
    probabilities: list[Tensor]
    """What each was drawn from, (V,); empty for a greedy request."""


@dataclass(slots=True)
class _Candidate:
    """What is known of one sub-network as a draft of another."""

    network: Network
    num_rounds: int = 0
    accepted: float = 0.0
    """Share of the checked drafts that were accepted, with those long ago counting less."""
    checked: float = 0.0
    time: TimeLine = field(default_factory=TimeLine)

    @property
    def acceptance(self) -> float:
        """Chance that a drafted token is right, if those before it were; between the counts and what is assumed."""
        return (self.accepted + 3.0) / (self.checked + 4.0)

    def learn(self, num_accepted: int, num_drafted: int) -> None:
        """Count what became of a draft: the first wrong token is the last that was checked."""
        self.accepted = 0.98 * self.accepted + num_accepted
        self.checked = 0.98 * self.checked + min(num_accepted + 1, num_drafted)


class Speculator:
    """Drafts, and learns from what becomes of its drafts."""

    _TRIALS = 6
    """Rounds that each candidate gets before they are compared."""
    _AGAIN = 50
    """Every so many rounds another candidate is tried again."""

    def __init__(self, settings: Speculation, runner: Runner, scheduler: Scheduler[Request]) -> None:
        """Take what computes and what gives memory."""
        self.settings = settings
        self.num_drafted = 0
        """Tokens, of all requests so far."""
        self.num_accepted = 0
        self._runner, self._scheduler = runner, scheduler
        self._candidates: dict[Network, list[_Candidate]] = {}
        self._own: dict[Network, TimeLine] = {}
        self._used: _Candidate | None = None
        self._round = 0

    def draft(self, scheduled: Sequence[tuple[Request, int]]) -> dict[Request, Draft]:
        """Drafts for the requests of an iteration, where it is worth while; their pages are reserved.

        Only iterations without prompts, and of a single sub-network without a router, are sped up.
        """
        self._used = None
        own = scheduled[0][0].network
        if len(scheduled) > self.settings.max_num_seqs or own.router is not None:
            return {}
        if any(s.num_new != 1 or s.network is not own for s, _ in scheduled):
            return {}
        candidate, length = self._choose(own, len(scheduled))
        room = {s: min(length, s.num_prompt + s.params.max_tokens - len(s.tokens) - 1) for s, _ in scheduled}
        drafts = {
            s: Draft([], [])
            for s, n in room.items()
            if n > 0 and self._scheduler.reserve(s, s.num_computed_tokens + 1 + n)
        }
        if drafts:
            self._used = candidate
            for i in range(max(room[s] for s in drafts)):
                self._extend({s: d for s, d in drafts.items() if room[s] > i}, candidate)
        return drafts

    def _extend(self, drafts: Mapping[Request, Draft], candidate: _Candidate) -> None:
        """One token more for each."""
        chunks = [
            Chunk(s, s.num_computed_tokens + len(d.tokens), [(s.tokens + d.tokens)[-1]], candidate.network, 1)
            for s, d in drafts.items()
        ]
        began = perf_counter()
        logits_BV = self._runner.run(chunks, self.settings.weights).logits_RV
        candidate.time.add(len(chunks), perf_counter() - began)
        for (s, d), logits_V in zip(drafts.items(), logits_BV, strict=True):
            own_BV = s.choice_scores(logits_V[None], d.tokens)
            if s.params.temperature > 0:
                d.probabilities.append(probabilities(own_BV, s.params)[0])
                d.tokens.append(int(torch.multinomial(d.probabilities[-1], 1, generator=s.generator)))
            else:
                d.tokens.append(int(most_likely(own_BV)))

    def learn(self, network: Network, num_tokens: int, seconds: float, accepted: Sequence[tuple[int, int]]) -> None:
        """Take in an iteration of a single network: its size and time, and what was accepted of how many drafted."""
        self._own.setdefault(network, TimeLine()).add(num_tokens, seconds)
        for num_accepted, num_drafted in accepted:
            self.num_accepted += num_accepted
            self.num_drafted += num_drafted
            if self._used is not None:
                self._used.learn(num_accepted, num_drafted)
        self._used = None

    def forget(self, adapter: Adapter) -> None:
        """Drop what was measured of networks with an adapter."""
        self._candidates = {n: found for n, found in self._candidates.items() if n.adapter is not adapter}
        self._own = {n: line for n, line in self._own.items() if n.adapter is not adapter}

    def _choose(self, own: Network, num_seqs: int) -> tuple[_Candidate, int]:
        """The candidate and length with the most tokens a second; 0 tokens if not to draft is best."""
        if own not in self._candidates:
            networks = [nested_network(own, spec) for spec in self.settings.drafts]
            self._candidates[own] = [_Candidate(network) for network in networks]
        candidates, self._round = self._candidates[own], self._round + 1
        fresh = next((c for c in candidates if c.num_rounds < self._TRIALS), None)
        if fresh is not None or self._round % self._AGAIN == 0:
            chosen = fresh or candidates[self._round // self._AGAIN % len(candidates)]
            length = self.settings.num_tokens or 1 + chosen.num_rounds % min(4, self.settings.max_num_tokens)
            chosen.num_rounds += 1
            return chosen, length
        if own not in self._own:
            return candidates[0], 0
        rates = [(self._rate(own, c, n, num_seqs), c, n) for c in candidates for n in self._lengths()]
        _, candidate, length = max(rates, key=lambda rate: rate[0])
        return candidate, length

    def _lengths(self) -> Iterator[int]:
        if self.settings.num_tokens is not None:
            yield self.settings.num_tokens
            return
        yield from range(self.settings.max_num_tokens + 1)

    def _rate(self, own: Network, candidate: _Candidate, length: int, num_seqs: int) -> float:
        """Expected tokens a second of one request."""
        a = candidate.acceptance
        expected = sum(a**i for i in range(length + 1))
        return expected / (length * candidate.time(num_seqs) + self._own[own](num_seqs * (1 + length)))


def verified(draft: Draft, logits_TV: Tensor, params: SamplingParams, generator: torch.Generator | None) -> list[int]:
    """The drafted tokens that hold, and one more by the checking network.

    Args:
        draft: T - 1 tokens.
        logits_TV: scores of the checking network before each of them, and after the last.
        params: parameters of the request.
        generator: generator of its draws.

    Returns:
        1 to T tokens, distributed as if they had been drawn one by one.
    """
    if params.temperature == 0:
        own = most_likely(logits_TV).tolist()
        agreed = next((i for i, token in enumerate(draft.tokens) if token != own[i]), len(draft.tokens))
        return [*draft.tokens[:agreed], own[agreed]]
    p_TV = probabilities(logits_TV, params)
    for i, token in enumerate(draft.tokens):
        p_V, q_V = p_TV[i] / p_TV[i].sum(), draft.probabilities[i] / draft.probabilities[i].sum()
        if float(torch.rand((), generator=generator, device=p_V.device)) * q_V[token] < p_V[token]:
            continue
        rest_V = (p_V - q_V).clamp_min(0)
        if not rest_V.sum() > 0:  # equal but for rounding
            rest_V = p_V
        return [*draft.tokens[:i], int(torch.multinomial(rest_V, 1, generator=generator))]
    return [*draft.tokens, int(sample(logits_TV[-1:], params, generator))]
