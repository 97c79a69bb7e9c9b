"""The engine: requests with sub-networks of their own, served by one set of weights in shared iterations.

A step is: schedule (`Scheduler`), maybe draft (`Speculator`), run (`Runner`), draw, advance.
Everything is a function of the requests, so answers do not depend on what else was in the batch (up to floating-point
rounding; what speculation draws is the same in distribution only).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from flextron.engine.networks import Networks
from flextron.engine.pages import PagePool
from flextron.engine.pooling import Pooled, Pooling
from flextron.engine.ranks import LeadingRunner
from flextron.engine.request import Chunk, FinishReason, Network, Request
from flextron.engine.runner import Runner, block_bytes, greedy_tokens
from flextron.engine.scheduler import Scheduler
from flextron.engine.scores import Logprobs, answer_logprobs
from flextron.engine.settings import EngineSettings
from flextron.engine.speculation import Speculator, verified
from flextron.errors import FlextronError, LongPromptError
from flextron.generation.constraints import Constraint
from flextron.generation.processors import check_named_tokens
from flextron.generation.prompts import check_prompt
from flextron.generation.sampling import SamplingParams, sample
from flextron.model.adapter import Adapter
from flextron.model.batch import TokenChoice
from flextron.model.decoder import Decoder
from flextron.parallel.companions import LostRankError
from flextron.spec import SubnetSpec

__all__ = ["EngineCore", "StepOutput"]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step did for a request: a token, or its end."""

    request: Request
    token: int | None
    """The token; None if it was a stop token, or none was asked for."""
    logprobs: Logprobs | None
    """Log-probabilities, if the request asked for them."""
    finish_reason: FinishReason | None
    """Why the request ended with this token; None if it goes on."""
    stop_token: int | None = None
    """The stop token that ended it."""


class EngineCore:
    """Continuous batching over a paged KV cache, on token ids and sub-networks."""

    def __init__(self, decoder: Decoder, settings: EngineSettings | None = None) -> None:
        """Reserve the KV cache.

        Args:
            decoder: the full, frozen model; must not change while the engine runs. On several ranks it is only read
                here, and `decoder` is then this rank's shard.
            settings: sizes.

        Raises:
            FlextronError: the model cannot run as the settings ask.
        """
        self.settings = settings = settings or EngineSettings()
        num_blocks = int(settings.kv_cache_gb * 1e9) // block_bytes(decoder, settings.page_size)
        self.pool = PagePool(num_blocks)
        self.runner = self._make_runner(decoder, num_blocks)
        self.decoder = self.runner.decoder
        self.scheduler: Scheduler[Request] = Scheduler(
            self.pool,
            page_size=settings.page_size,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            prefix_caching=settings.prefix_caching,
        )
        self.speculator: Speculator | None = None
        if settings.speculation is not None:
            if not all(spec.is_nested_in(decoder.widths) for spec in settings.speculation.drafts):
                raise FlextronError("a sub-network that is to draft is not nested in the model")
            self.speculator = Speculator(settings.speculation, self.runner, self.scheduler)
        self.num_tokens = 0
        """Tokens that the last step computed, drafts left out."""
        self._networks = Networks(self.decoder, self.runner)
        self._generator = torch.Generator(decoder.device)
        self._generator.seed()

    def _make_runner(self, decoder: Decoder, num_blocks: int) -> Runner:
        settings = self.settings
        if settings.tensor_parallel > 1:
            ranks, page_size = settings.tensor_parallel, settings.page_size
            return LeadingRunner(decoder, ranks, num_blocks=num_blocks, page_size=page_size)
        return Runner(
            decoder,
            num_blocks=num_blocks,
            page_size=settings.page_size,
            native=settings.native,
            weights=settings.weights,
            draft_weights=None if settings.speculation is None else settings.speculation.weights,
            screens_head=settings.screens_head,
            adapts_threads=settings.adapts_threads,
        )

    def close(self) -> None:
        """End the other ranks; nothing can be computed afterwards. An engine without others needs no end."""
        if isinstance(self.runner, LeadingRunner):
            self.runner.close()

    def on_loss(self, listener: Callable[[LostRankError], None]) -> None:
        """Have something called, in a thread of its own, when another rank dies, also while nothing is computed."""
        if isinstance(self.runner, LeadingRunner) and self.runner.companions is not None:
            self.runner.companions.on_loss(listener)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def network(self, spec: SubnetSpec, router: TokenChoice | None = None, adapter: Adapter | None = None) -> Network:
        """The engine's form of a sub-network; the same one for the same arguments.

        Args:
            spec: the sub-network.
            router: chooses the MLP width of each token; by default all have the spec's.
            adapter: what stands beside the linears; must not change until `forget`.

        Raises:
            FlextronError: the sub-network is not nested in the model or in the adapter's widths, router or adapter are
                another model's, or the two cannot run together.
        """
        return self._networks.get(spec, router, adapter)

    def narrow(self, request: Request, spec: SubnetSpec) -> None:
        """Go on with a request in another sub-network from its next token on; nothing happens if it has ended.

        Keys and values of what it has computed are kept: a step costs the narrower sub-network's time at once, but no
        memory is freed. Its pages are shared with nobody from now on, for they would hold what two sub-networks made.

        Args:
            request: one without a router.
            spec: the sub-network, with at most the KV groups of the request's own in every layer.

        Raises:
            FlextronError: it has more, or does not go with the request's router or adapter.
        """
        if request.finish_reason is not None or request.network.spec == spec:
            return
        request.network = self._networks.narrowed(request.network, spec)
        request.has_mixed_pages = bool(request.pages)

    def forget(self, adapter: Adapter) -> None:
        """Let go of an adapter, at once or with the last request that uses it; `network` takes it again at any time."""
        self._networks.forget(adapter)
        self._drop_unused()

    def _drop_unused(self) -> None:
        """Let go of the forgotten adapters that no request uses."""
        for adapter in self._networks.leave(s.network for s in self.scheduler):
            self.runner.forget(adapter)
            if self.speculator is not None:
                self.speculator.forget(adapter)

    def capacity(self, spec: SubnetSpec) -> int:
        """Tokens of one request in a sub-network that model and KV cache have room for; callable from any thread."""
        config, num_blocks = self.decoder.config, self.runner.num_page_blocks(spec)
        pages = self.pool.num_blocks // num_blocks if num_blocks else config.max_position_embeddings
        return min(config.max_position_embeddings, pages * self.settings.page_size)

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        network: Network,
        constraint: Constraint | None = None,
        pooling: Pooling | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            request_id: unique among the unfinished ones.
            prompt: token ids.
            params: how tokens are chosen, and when to stop.
            network: a result of `network`.
            constraint: a grammar at its start, for this request alone; its end ends the answer.
            pooling: how the prompt becomes a vector (`Request.pooled`), which is then all that is wanted; `params` must
                ask for no token.

        Raises:
            PromptError: the prompt is empty, has unknown tokens, or is too long for the model or the KV cache.
        """
        check_prompt(self.decoder.config, prompt, params.max_tokens)
        check_named_tokens(params, self.decoder.config.vocab_size)
        total = len(prompt) + params.max_tokens
        if total > self.capacity(network.spec):
            raise LongPromptError(
                f"prompt and answer come to {total} tokens, more than the KV cache of "
                f"{self.settings.kv_cache_gb:g} GB holds; raise kv_cache_gb or lower max_tokens"
            )
        generator = None
        if params.seed is not None:
            generator = torch.Generator(self.decoder.device).manual_seed(params.seed)
        request = Request(request_id, list(prompt), len(prompt), network, params, generator or self._generator)
        request.constraint = constraint
        request.pooled = None if pooling is None else Pooled(pooling, self.decoder.config.logits_scale)
        self.scheduler.add(request)
        return request

    def abort(self, request: Request) -> None:
        """End a request now; its memory is free at once. Nothing happens if it has ended."""
        if request.finish_reason is None:
            request.finish_reason = FinishReason.ABORT
            self.scheduler.remove(request)
            self._drop_unused()

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """One iteration; the tokens of all requests that got some, those of one request in order.

        Raises:
            LostRankError: another rank is gone.
        """
        # neighbours of one network share a segment; their order decides how sums are rounded
        scheduled = sorted(self.scheduler.schedule(), key=lambda item: item[0].network.key)
        self.num_tokens = sum(n for _, n in scheduled)
        if not scheduled:
            return []
        drafts = {} if self.speculator is None else self.speculator.draft(scheduled)
        chunks = [_chunk(s, n, drafts[s].tokens if s in drafts else []) for s, n in scheduled]
        began = perf_counter()
        made = self.runner.run(chunks)
        seconds = perf_counter() - began
        logits = made.logits_RV.split([c.num_logits for c in chunks])
        hidden = made.hidden_SD.split([c.num_hidden for c in chunks])
        greedy = greedy_tokens(chunks, made.logits_RV)
        outputs: list[StepOutput] = []
        kept = []
        for (request, num_new), chunk, logits_TV, hidden_TD in zip(scheduled, chunks, logits, hidden, strict=True):
            if request.pooled is not None:
                request.pooled.add(chunk.start, hidden_TD)
            if request.scores_prompt:
                request.score_prompt(chunk.start, logits_TV)
            if num_new < request.num_new:
                self.scheduler.advance(request, num_new)
                continue
            if request in drafts:
                scores_TV = request.choice_scores(logits_TV, drafts[request].tokens)
                tokens = verified(drafts[request], scores_TV, request.params, request.generator)
                kept.append((len(tokens) - 1, len(drafts[request].tokens)))
            elif request.params.max_tokens:
                logits_TV = logits_TV[-1:]
                tokens = (
                    greedy.get(request)
                    or sample(request.choice_scores(logits_TV), request.params, request.generator).tolist()
                )
            else:
                request.finish_reason = FinishReason.LENGTH if request.pooled is None else FinishReason.STOP
                tokens = []
            outputs += self._append(request, num_new, tokens, logits_TV)
        if self.speculator is not None and all(s.network is scheduled[0][0].network for s, _ in scheduled):
            self.speculator.learn(scheduled[0][0].network, sum(len(c.tokens) for c in chunks), seconds, kept)
        self._drop_unused()
        return outputs

    def _append(self, request: Request, num_new: int, tokens: Sequence[int], logits_TV: Tensor) -> list[StepOutput]:
        """Add what follows the scheduled tokens, up to the end of the request."""
        outputs = [] if tokens else [StepOutput(request, None, None, request.finish_reason)]
        for token, logits_V in zip(tokens, logits_TV, strict=False):
            logprobs = answer_logprobs(logits_V, token, request.params.logprobs)
            if token in request.params.stop_token_ids:
                request.finish_reason = FinishReason.STOP
                outputs.append(StepOutput(request, None, logprobs, request.finish_reason, token))
                break
            request.tokens.append(token)
            if request.constraint is not None and request.constraint.accept(token):
                # one that has failed cuts its own answer short, and nobody else's
                request.finish_reason = FinishReason.LENGTH if request.constraint.has_failed else FinishReason.STOP
            elif len(request.tokens) - request.num_prompt == request.params.max_tokens:
                request.finish_reason = FinishReason.LENGTH
            outputs.append(StepOutput(request, token, logprobs, request.finish_reason))
            if request.finish_reason is not None:
                break
        # of the tokens that were added, only the last is not computed yet
        num_added = max(0, len(outputs) - 1)
        num_computed_tokens = min(request.num_computed_tokens + num_new + num_added, len(request.tokens))
        self.scheduler.advance(request, num_computed_tokens - request.num_computed_tokens)
        if request.finish_reason is not None:
            self.scheduler.remove(request)
        return outputs


def _chunk(request: Request, num_new: int, drafted: list[int]) -> Chunk:
    """The scheduled tokens of a request, and those that were drafted."""
    start = request.num_computed_tokens
    tokens = request.tokens[start : start + num_new] + drafted
    is_last = num_new == request.num_new
    if request.pooled is not None:
        num_hidden = request.pooled.num_wanted(len(tokens), is_last=is_last)
        return Chunk(request, start, tokens, request.network, 0, num_hidden)
    num_logits = 1 + len(drafted) if is_last else 0
    if request.scores_prompt:
        num_logits = len(tokens)
    return Chunk(request, start, tokens, request.network, num_logits)
