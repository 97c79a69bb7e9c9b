"""The keys of a body that say how tokens are drawn, and where an answer ends."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flextron.generation.defaults import GenerationDefaults
from flextron.generation.sampling import SamplingParams
from flextron.protocols.keys import check_keys
from flextron.serving.errors import bad_value

__all__ = ["RequestBody", "SamplingBody", "StrictBody"]

_LEAST_TEMPERATURE = 1e-5
"""Below it scores divided by the temperature lose their meaning in float32, and the choice is the likeliest anyway."""

_ID = re.compile("[0-9]{1,10}")
_MOST_STOPS = 16
_MOST_STOP_LETTERS = 256
_MOST_WORDS = 256
_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}


class StrictBody(BaseModel):
    """No number is a text, no text a number, and no key is unknown."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


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
    return stop or None


def _check_bias(bias: Any) -> Any:
    """Keys of JSON objects are texts; these are token ids. An empty list is llama-server's way to say nothing."""
    if bias == []:
        return None
    if isinstance(bias, Mapping) and not all(isinstance(key, str) and _ID.fullmatch(key) for key in bias):
        raise ValueError("logit_bias must have token ids as keys")
    return bias


_Stop = Annotated[str, Field(min_length=1, max_length=_MOST_STOP_LETTERS)]
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class RequestBody(StrictBody):
    """A body that holds what the model reads."""

    prompt_key: ClassVar[str]
    """The key that the prompt comes from."""
    endpoint: ClassVar[str | None] = None
    """The endpoint's name in the table of keys; None where the body's own are all that there are."""

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        return data if cls.endpoint is None or not isinstance(data, dict) else check_keys(data, cls.endpoint)


class SamplingBody(StrictBody):
    """Sampling, as OpenAI and vLLM have it."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """vLLM's key: so many likeliest tokens; -1 and 0 are off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """vLLM's key: the least fraction of the likeliest token's probability."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    """vLLM's key: 1 is off."""
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_check_bias)] = (
        None
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        _Stop | Annotated[list[_Stop], Field(max_length=_MOST_STOPS)] | None, BeforeValidator(_check_stops)
    ] = None
    stop_token_ids: list[_Token] | None = None
    """vLLM's key: tokens that end an answer, beside those of the checkpoint."""
    include_stop_str_in_output: bool | None = None
    """vLLM's key: keep the stop string, or the text of the stop token, that ended the answer."""
    ignore_eos: bool | None = None
    """vLLM's key: go on where the model would end."""
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    """vLLM's key: tokens before the answer may end."""
    bad_words: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=_MOST_WORDS)] | None = None
    """vLLM's key: texts that must not come."""
    allowed_token_ids: Annotated[list[_Token], Field(min_length=1)] | None = None
    """vLLM's key: only these tokens may come."""
    skip_special_tokens: bool | None = None
    """vLLM's key: whether special tokens have no text; true by default."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check_tokens(self, vocab_size: int) -> None:
        """Refuse ids of tokens that the model does not have.

        Raises:
            ApiError: there is one.
        """
        named = {"logit_bias": map(int, self.logit_bias or ()), "allowed_token_ids": self.allowed_token_ids or ()}
        for param, tokens in named.items():
            if any(token >= vocab_size for token in tokens):
                raise bad_value(f"{param} names a token outside the model's vocabulary of {vocab_size}", param)

    def sampling(
        self,
        choice: int,
        max_tokens: int,
        defaults: GenerationDefaults,
        bad_words_ids: tuple[tuple[int, ...], ...] = (),
        **more: Any,
    ) -> SamplingParams:
        """How the tokens of a choice are drawn; choices of one prompt have seeds of their own.

        Args:
            choice: number of the choice.
            max_tokens: new tokens at most.
            defaults: the checkpoint's.
            bad_words_ids: `bad_words` in tokens.
            more: other fields of `SamplingParams`.

        Raises:
            ApiError: more tokens are asked for than there may be.
            FlextronError: as for `SamplingParams`.
        """
        if (self.min_tokens or 0) > max_tokens:
            raise bad_value(f"min_tokens ({self.min_tokens}) must be at most max_tokens ({max_tokens})", "min_tokens")
        temperature, top_p = self._chosen("temperature", defaults, 1.0), self._chosen("top_p", defaults)
        is_greedy = temperature < _LEAST_TEMPERATURE or top_p == 0
        ends = () if self.ignore_eos else defaults.ends
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=0.0 if is_greedy else temperature,
            top_p=1.0 if is_greedy else top_p,
            top_k=max(0, self._chosen("top_k", defaults)),
            min_p=self._chosen("min_p", defaults),
            repetition_penalty=self._chosen("repetition_penalty", defaults),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            bad_words_ids=bad_words_ids,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            stop_token_ids=(*ends, *(self.stop_token_ids or ())),
            **more,
        )

    def _chosen(self, name: str, defaults: GenerationDefaults, usual: Any = None) -> Any:
        """What the body says, else what the checkpoint says, else what changes nothing."""
        found = (getattr(self, name), getattr(defaults, name), _DEFAULTS[name] if usual is None else usual)
        return next(value for value in found if value is not None)
