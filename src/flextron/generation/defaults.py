"""What a checkpoint says about generating: its ends of text, and how its makers draw tokens.

Ends are named in three places that seldom agree: `generation_config.json` (the end of a turn, often), `config.json` and
the tokenizer. All of them end an answer. The sampling settings are treated as vLLM treats them: defaults of the server
and of the engine, where a request says nothing. Settings without an implementation are told, not dropped in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError
from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.files import read_json
from flextron.generation.sampling import SamplingParams

__all__ = ["GENERATION_CONFIG", "GenerationDefaults", "generation_defaults", "read_generation_config"]

_log = logging.getLogger("flextron.model")
GENERATION_CONFIG = "generation_config.json"
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "force_words_ids": (),
    "stop_strings": (),
    "watermarking_config": (),
    "max_time": (),
    "token_healing": (),
    # llama.cpp's
    "sequence": (),
    "xtc_probability": (0,),
    "mirostat": (0,),
    "penalty_last_n": (-1, 0),
}
"""Settings that would change answers and have no implementation, with the values (beside null, empty) that do not."""


class _File(BaseModel):
    """The keys that are used; others pass."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    eos_token_id: StrictInt | list[StrictInt] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    do_sample: bool | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    max_new_tokens: Annotated[StrictInt, Field(ge=1)] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """What holds where a request says nothing."""

    ends: tuple[int, ...] = ()
    """Tokens that end an answer, ascending."""
    temperature: float | None = None
    """Temperature; None if the checkpoint names none."""
    top_p: float | None = None
    """Nucleus probability; None if the checkpoint names none."""
    top_k: int | None = None
    """Number of likeliest tokens; None if the checkpoint names none."""
    min_p: float | None = None
    """Least fraction of the likeliest token's probability; None if the checkpoint names none."""
    repetition_penalty: float | None = None
    """Penalty of repeated tokens; None if the checkpoint names none."""
    max_new_tokens: int | None = None
    """Most new tokens; None if the checkpoint names no limit."""
    unsupported: Mapping[str, Any] | None = None
    """Settings that would change answers and are not applied."""

    def sampling(self) -> SamplingParams:
        """How tokens are chosen where nothing else is said: greedily, unless the checkpoint names a temperature."""
        usual = SamplingParams()
        return SamplingParams(
            max_tokens=min(usual.max_tokens, self.max_new_tokens or usual.max_tokens),
            temperature=0.0 if self.top_p == 0 else self.temperature or 0.0,
            top_p=self.top_p or 1.0,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
        )

    @property
    def complaint(self) -> str | None:
        """One sentence about what is not applied, for people; None if all is."""
        if not self.unsupported:
            return None
        named = ", ".join(f"{key} {_short(value)}" for key, value in self.unsupported.items())
        return f"the checkpoint asks for {named}, which this program does not have; answers are drawn without"


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """A checkpoint's `generation_config.json`; None if it has none.

    Raises:
        FlextronError: it is malformed.
    """
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return None
    found = read_json(path)
    if not isinstance(found, dict):
        raise FlextronError(f"{path} holds no JSON object; download it again, or delete it to do without")
    _checked(found, str(path))
    return found


def generation_defaults(
    generation_config: Mapping[str, Any] | None,
    hf_config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
) -> GenerationDefaults:
    """What a checkpoint says about generating.

    Args:
        generation_config: its `generation_config.json`, if it has one.
        hf_config: its `config.json`.
        tokenizer: its tokenizer, if it has one.

    Raises:
        FlextronError: a setting has a wrong type or is out of range.
    """
    settings = dict(generation_config or {})
    found = _checked(settings, GENERATION_CONFIG)
    named = (found.eos_token_id, hf_config.get("eos_token_id"), None if tokenizer is None else tokenizer.eos_token_id)
    ends = {token for given in named for token in _ids(given)}
    size = hf_config.get("vocab_size")
    missing = {token for token in ends if token < 0 or (isinstance(size, int) and token >= size)}
    if missing:
        _log.warning(
            "the checkpoint names tokens %s as ends of text, which do not exist; they are ignored", sorted(missing)
        )
    unsupported = {key: settings[key] for key, neutral in _NEUTRAL.items() if _is_set(settings.get(key), neutral)}
    temperature = found.temperature
    if temperature is None and found.do_sample:
        temperature = 1.0  # transformers' default of those who sample
    return GenerationDefaults(
        ends=tuple(sorted(ends - missing)),
        temperature=temperature,
        top_p=found.top_p,
        top_k=found.top_k,
        min_p=found.min_p,
        repetition_penalty=found.repetition_penalty,
        max_new_tokens=found.max_new_tokens,
        unsupported=unsupported,
    )


def _checked(given: Mapping[str, Any], where: str) -> _File:
    try:
        return _File.model_validate(dict(given))
    except ValidationError as error:
        key, said = error.errors()[0]["loc"][0], error.errors()[0]["msg"]
        raise FlextronError(
            f"{where} has a bad {key} ({said[0].lower()}{said[1:]}); mend it, or delete the file to do without"
        ) from error


def _ids(given: Any) -> Sequence[int]:
    """Token ids, one or several or none; what is no id is left to whom the file belongs."""
    several = given if isinstance(given, (list, tuple)) else [given]
    return [i for i in several if isinstance(i, int) and not isinstance(i, bool)]


def _is_set(value: Any, neutral: Sequence[float]) -> bool:
    return value not in (None, False, [], {}, *neutral)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
