"""Bodies of requests, as OpenAI has them; what becomes of keys that are not here is in `keys` and `messages`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flextron.checkpoints.generation_config import GenerationDefaults
from flextron.generation.generate import SamplingParams
from flextron.server.keys import check_keys
from flextron.server.messages import check_messages
from flextron.serving.targets import TargetBody

__all__ = ["ChatBody", "CompletionBody", "GenerationBody", "Message"]

_LEAST_TEMPERATURE = 1e-5
"""Below it scores divided by the temperature lose their meaning in float32, and the choice is the likeliest anyway."""

_MOST_STOPS = 16
_MOST_STOP_LETTERS = 256


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """OpenAI's padding of streams; it is accepted, and none is sent."""
    continuous_usage_stats: Literal[False] | None = None
    """vLLM's key for the usage in every chunk; only false is accepted."""


def _check_stops(stop: Any) -> Any:
    """Say what is wrong with stop strings, which a union of types cannot."""
    stops = stop if isinstance(stop, list) else [stop]
    if len(stops) > _MOST_STOPS:
        raise ValueError(f"{len(stops)} stop strings are more than {_MOST_STOPS}; give fewer")
    for text in stops:
        if text == "":
            raise ValueError("a stop string is empty; give at least one character")
        if isinstance(text, str) and len(text) > _MOST_STOP_LETTERS:
            raise ValueError(f"a stop string has {len(text)} characters, more than {_MOST_STOP_LETTERS}; shorten it")
    return stop


_Stop = Annotated[str, Field(min_length=1, max_length=_MOST_STOP_LETTERS)]


class GenerationBody(_Strict):
    """What completions and chat have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[
        _Stop | Annotated[list[_Stop], Field(max_length=_MOST_STOPS)] | None, BeforeValidator(_check_stops)
    ] = None
    ignore_eos: bool | None = None
    """vLLM's key: go on where the model would end."""
    add_special_tokens: bool | None = None
    """vLLM's key: whether prompts begin as the tokenizer begins a text. By default texts do, rendered chats do not."""
    flextron: TargetBody | None = None

    endpoint: ClassVar[str]
    """The endpoint's name in the table of keys."""
    prompt_key: ClassVar[str]
    """The key that the prompt comes from."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        return check_keys(data, cls.endpoint) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream to true or leave it out")
        return self

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_logprobs(self) -> int | None:
        """Most likely tokens to report at each position; None for no log-probabilities."""
        raise NotImplementedError

    def sampling(self, choice: int, max_tokens: int, defaults: GenerationDefaults) -> SamplingParams:
        """How the tokens of a choice are drawn; choices of one prompt have seeds of their own."""
        temperature, top_p = (
            next(value for value in values if value is not None)
            for values in ((self.temperature, defaults.temperature, 1.0), (self.top_p, defaults.top_p, 1.0))
        )
        is_greedy = temperature < _LEAST_TEMPERATURE or top_p == 0
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if is_greedy else temperature,
            top_p=1.0 if is_greedy else top_p,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            stop_token_ids=() if self.ignore_eos else defaults.ends,
            logprobs=self.num_logprobs,
        )


class CompletionBody(GenerationBody):
    """Body of `/v1/completions`."""

    endpoint = "completions"
    prompt_key = "prompt"

    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError("best_of other than n is not supported by this server; leave it out")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported by this server; ask for one of them")
        if not self.prompt:
            raise ValueError("prompt is empty; give at least one token")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[t for t in self.prompt if isinstance(t, int)]]
        return [p for p in self.prompt if not isinstance(p, int)]

    @property
    def num_logprobs(self) -> int | None:
        """Number of log-probabilities that were asked for."""
        return self.logprobs


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart]
    name: str | None = None

    def to_template(self) -> dict[str, Any]:
        """What chat templates expect: a text, and no role that is younger than they are."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatBody(GenerationBody):
    """Body of `/v1/chat/completions`."""

    endpoint = "chat"
    prompt_key = "messages"

    messages: Annotated[list[Message], Field(min_length=1), BeforeValidator(check_messages)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set logprobs to true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Number of log-probabilities that were asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None
