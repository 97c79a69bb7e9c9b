"""One request's answer while it grows: from the engine's tokens to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron.engine import FinishReason, Logprobs, StepOutput
from flextron.generation.detokenize import Detokenizer, StopStrings

__all__ = ["Delta", "OutputProcessor"]


@dataclass(slots=True)
class Delta:
    """What one or more steps of the engine added to an answer."""

    text: str = ""
    """May lag behind the tokens: characters in halves and beginnings of stop strings wait."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    """One entry a token, where they were asked for."""
    offsets: list[int] = field(default_factory=list)
    """Where each token's text begins in the answer's, in characters."""
    mlp_shares: list[float] = field(default_factory=list)
    """With a token router, the share of the full model's MLP neurons that chose each token."""
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    """The stop string, or the stop token, that ended the answer."""
    end: tuple[int, Logprobs, int] | None = None
    """The stop token that ended the answer and is no part of it, where log-probabilities were asked for: its id, its
    log-probabilities, and where its text would begin."""
    prompt_logprobs: list[Logprobs] | None = None
    """Log-probabilities of the prompt's tokens after the first, if asked for; the first step brings them."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that were in the cache."""
    embedding: Tensor | None = None
    """The prompt's vector, where one was asked for; the last step brings it."""
    started: float | None = None
    """When the request first ran, by `time.monotonic`."""

    def add(self, later: Delta) -> None:
        """Append what later steps added."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.offsets += later.offsets
        self.mlp_shares += later.mlp_shares
        self.finish_reason, self.stop, self.end = later.finish_reason, later.stop, later.end
        self.prompt_logprobs = later.prompt_logprobs if self.prompt_logprobs is None else self.prompt_logprobs
        self.embedding = later.embedding
        self.started = later.started
        self.num_cached_tokens = max(self.num_cached_tokens, later.num_cached_tokens)


@dataclass(slots=True)
class OutputProcessor:
    """One request's way from tokens to text."""

    tokenizer: PreTrainedTokenizerBase
    stop: Sequence[str] = ()
    prompt: InitVar[Sequence[int]] = ()
    """Token ids; the answer's text is what it adds to theirs."""
    includes_stop: bool = False
    """Whether the text keeps the stop string or the stop token that ended it."""
    skip_special_tokens: bool = True
    answer: Delta = field(default_factory=Delta)
    """The answer so far, without a stop string."""
    _detokenizer: Detokenizer = field(init=False)
    _stops: StopStrings = field(init=False)

    def __post_init__(self, prompt: Sequence[int]) -> None:
        """Start with no text."""
        self._detokenizer = Detokenizer(self.tokenizer, prompt, skip_special_tokens=self.skip_special_tokens)
        self._stops = StopStrings(self.stop, includes_stop=self.includes_stop)

    def take(self, output: StepOutput) -> Delta:
        """Add what a step did. The answer may be at its end before the engine's request is."""
        request = output.request
        delta = Delta(finish_reason=output.finish_reason)
        if not self.answer.token_ids and request.params.prompt_logprobs is not None:
            delta.prompt_logprobs = request.prompt_logprobs
        delta.num_cached_tokens, delta.started = request.num_cached_tokens or 0, request.started
        if output.finish_reason is not None and request.pooled is not None:
            delta.embedding = request.pooled.vector
        if output.token is not None:
            delta.offsets.append(self._detokenizer.position)
            delta.token_ids.append(output.token)
            if output.logprobs is not None:
                delta.logprobs.append(output.logprobs)
            if request.mlp_share is not None:
                delta.mlp_shares.append(request.mlp_share)
            text = self._detokenizer.push(output.token)
            is_early = len(self.answer.token_ids) < request.params.min_tokens
            delta.text = text if is_early else self._stops.push(text)
        if output.stop_token is not None and output.logprobs is not None:
            delta.end = (output.stop_token, output.logprobs, self._detokenizer.position)
        if output.stop_token is not None and self.includes_stop:
            delta.text += self._stops.push(self._detokenizer.push(output.stop_token))
        if output.finish_reason is not None:
            delta.text += self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        delta.stop = output.stop_token
        if self._stops.found is not None:
            delta.finish_reason, delta.stop = FinishReason.STOP, self._stops.found
        self.answer.add(delta)
        return delta
