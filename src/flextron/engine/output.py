"""One request's answer while it grows: from the engine's tokens to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

from transformers import PreTrainedTokenizerBase

from flextron.engine import FinishReason, Logprobs, StepOutput
from flextron.generation.detokenize import Detokenizer, StopStrings

__all__ = ["Answer", "Delta"]


@dataclass(frozen=True, slots=True)
class Delta:
    """What a step of the engine added to an answer."""

    text: str
    """May lag behind the tokens: characters in halves and beginnings of stop strings wait."""
    token: int | None
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    offset: int = 0
    """Position in the answer at which the token's text begins, in characters."""


@dataclass(slots=True)
class Answer:
    """Text, tokens and log-probabilities so far."""

    tokenizer: PreTrainedTokenizerBase
    stop: Sequence[str] = ()
    prompt: InitVar[Sequence[int]] = ()
    """Token ids; the answer's text is what it adds to theirs."""
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    _detokenizer: Detokenizer = field(init=False)
    _stops: StopStrings = field(init=False)

    def __post_init__(self, prompt: Sequence[int]) -> None:
        """Start with no text."""
        self._detokenizer = Detokenizer(self.tokenizer, prompt)
        self._stops = StopStrings(self.stop)

    @property
    def text(self) -> str:
        """The text so far, without a stop string."""
        return "".join(self.pieces)

    def take(self, output: StepOutput) -> Delta:
        """Add what a step did. The answer may be at its end before the engine's request is."""
        offset = self._detokenizer.position
        text = "" if output.token is None else self._stops.push(self._detokenizer.push(output.token))
        self.finish_reason = output.finish_reason
        if self.finish_reason is not None:
            text += self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        if self._stops.found:
            self.finish_reason = FinishReason.STOP
        if text:
            self.pieces.append(text)
        logprobs = None
        if output.token is not None:
            self.token_ids.append(output.token)
            if output.logprobs is not None:
                self.logprobs.append(logprobs := output.logprobs)
        return Delta(text, output.token, logprobs, self.finish_reason, offset)
