"""Bodies of requests, as OpenAI has them; what becomes of keys that are not here is in `keys` and `messages`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from flextron.protocols.messages import check_messages
from flextron.protocols.sampling import RequestBody, SamplingBody, StrictBody
from flextron.protocols.structured.grammars import GrammarBody
from flextron.protocols.structured.tools import ToolBody, ToolCallBody, ToolChoice
from flextron.serving.errors import bad_value
from flextron.serving.targets import TargetBody

__all__ = ["ChatBody", "CompletionBody", "GenerationBody", "Message"]


_MOST_LOGPROBS = 20


class StreamOptions(StrictBody):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """OpenAI's padding of streams; it is accepted, and none is sent."""
    continuous_usage_stats: bool | None = None
    """vLLM's key: whether every chunk tells the numbers of tokens so far, beside `include_usage`."""


class GenerationBody(SamplingBody, GrammarBody, RequestBody):
    """What completions and chat have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    add_special_tokens: bool | None = None
    """vLLM's key: whether prompts begin as the tokenizer begins a text. By default texts do, rendered chats do not."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None
    """vLLM's key: log-probabilities of the prompt, with so many likeliest tokens each."""
    return_token_ids: bool | None = None
    """vLLM's key: whether the token ids stand beside the texts."""
    flextron: TargetBody | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise bad_value("stream_options is for streams; set stream to true or leave it out", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise bad_value(
                "prompt_logprobs are not for streams; set stream to false or leave them out", "prompt_logprobs"
            )
        return self

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether each chunk tells the numbers of tokens so far."""
        return self.wants_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def num_logprobs(self) -> int | None:
        """Most likely tokens to report at each position; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the prompt."""
        return self.prompt_logprobs


class CompletionBody(GenerationBody):
    """Body of `/v1/completions`."""

    endpoint = "completions"
    prompt_key = "prompt"

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0 computes the prompts alone."""
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise bad_value("best_of other than n is not supported by this server; leave it out", "best_of")
        if not self.prompt:
            raise bad_value("prompt is empty; give at least one token", "prompt")
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

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Those of an echoed prompt are reported, too."""
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in asked if count is not None), default=None)


class TextPart(StrictBody):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(StrictBody):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart]
    name: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None

    def to_template(self) -> dict[str, Any]:
        """What chat templates expect: a text, and no role that is younger than they are."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        written: dict[str, Any] = {"role": role, "content": text}
        written |= {"tool_calls": [call.to_template() for call in self.tool_calls]} if self.tool_calls else {}
        more = {"name": self.name, "tool_call_id": self.tool_call_id}
        return written | {key: value for key, value in more.items() if value is not None}


class ChatBody(GenerationBody):
    """Body of `/v1/chat/completions`."""

    endpoint = "chat"
    prompt_key = "messages"

    messages: Annotated[list[Message], Field(min_length=1), BeforeValidator(check_messages)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[ToolBody], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    """vLLM's key: whether the conversation ends with the beginning of an answer; true by default."""
    continue_final_message: bool | None = None
    """vLLM's key: whether the last message is continued instead."""
    chat_template_kwargs: dict[str, Any] | None = None
    """vLLM's key: more that the chat template reads."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise bad_value("top_logprobs needs logprobs; set logprobs to true", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_value(
                "continue_final_message and add_generation_prompt exclude each other; give one of them",
                "continue_final_message",
            )
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise bad_value("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Number of log-probabilities that were asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None
