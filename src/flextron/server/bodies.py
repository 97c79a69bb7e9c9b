"""Bodies of requests, as OpenAI has them.

Clients newer than this server send keys that it does not know; those are ignored, as OpenAI's own service does. Keys
that would change the answer and are not supported are accepted with the value that changes nothing, and only with it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from flextron.model.generation import SamplingParams
from flextron.model.generation_config import GenerationDefaults

__all__ = ["ChatBody", "CompletionBody", "GenerationBody", "Message", "TargetBody"]

_LEAST_TEMPERATURE = 1e-5
"""Below it scores divided by the temperature lose their meaning in float32, and the choice is the likeliest anyway."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
"""Keys that would change the answer, with the values (beside null) that do not."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class TargetBody(_Strict):
    """What is asked of the sub-network, under the key `flextron`: the fields of `flextron.Target`, and two more."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    latency: float | None = None
    latency_ms: float | None = None
    params: int | None = None
    memory_gb: float | None = None
    max_loss_increase: float | None = None
    context: int | None = None
    router: Literal["token"] | None = None
    min_latency_target: Annotated[float, Field(gt=0, le=1)] | None = None
    """How narrow the sub-network may become while the server is busy; 1 allows nothing."""


class StreamOptions(_Strict):
    """Of a stream."""

    include_usage: bool | None = None


def _filled(text: str) -> str:
    if not text:
        raise ValueError("a stop string is empty; give at least one character")
    return text


_Stop = Annotated[str, Field(max_length=256), AfterValidator(_filled)]


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
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    """Of vLLM: write on where the model would end."""
    add_special_tokens: bool | None = None
    """Of vLLM: whether prompts begin as the tokenizer begins a text. By default texts do, rendered chats do not."""
    flextron: TargetBody | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key, neutral in _NEUTRAL.items():
                value = data.get(key)
                if value is not None and (isinstance(value, bool) or value not in neutral):
                    raise ValueError(f"{key} is not supported by this server; leave it out")
        return data

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
    """Of `/v1/completions`."""

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
        """As asked."""
        return self.logprobs


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """Of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    def to_template(self) -> dict[str, Any]:
        """What chat templates expect: a text, and no role that is younger than they are."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatBody(GenerationBody):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
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
        """As asked."""
        return (self.top_logprobs or 0) if self.logprobs else None
