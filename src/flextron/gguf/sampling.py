"""How the makers of a GGUF file draw tokens (`general.sampling.*`), as a `generation_config.json`, and the reverse.

llama.cpp takes these keys as defaults where a request says nothing, and its converter fills them in from
`generation_config.json`. Values that turn a setting off there (a `top_k` of 0, a `temp` below 0) do so here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from flextron.errors import FlextronError, shown
from flextron.generation.defaults import GenerationDefaults

__all__ = ["SAMPLING", "generation_config_from_metadata", "sampling_metadata"]

_log = logging.getLogger("flextron.model")
SAMPLING = "general.sampling."
"""Prefix of the keys."""
_WHOLE_ANSWER = -1
"""The `penalty_last_n` of a repetition penalty that counts all tokens, the only kind there is here."""
_ALIKE = ("xtc_probability", "mirostat", "sequence")
"""Keys that llama.cpp reads under the same names in `generation_config.json`; none is applied here, which is told."""
_SILENT = ("xtc_threshold", "mirostat_tau", "mirostat_eta")
"""They say nothing without one of these."""


def generation_config_from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a `generation_config.json` would say of sampling; empty where the file says nothing.

    Args:
        metadata: the file's keys and values.

    Raises:
        FlextronError: a key that counts holds no number.
    """
    given = {key.removeprefix(SAMPLING): value for key, value in metadata.items() if key.startswith(SAMPLING)}
    found: dict[str, Any] = {key: given.pop(key) for key in _ALIKE if key in given}
    if "temp" in given:
        temperature = _number(given, "temp")
        found |= {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    if "top_k" in given:
        found["top_k"] = max(0, int(_number(given, "top_k")))
    for key in ("top_p", "min_p"):
        if key in given:
            found[key] = min(1.0, max(0.0, _number(given, key)))
    last = int(_number(given, "penalty_last_n")) if "penalty_last_n" in given else _WHOLE_ANSWER
    if "penalty_repeat" in given and last != 0:
        found["repetition_penalty"] = _number(given, "penalty_repeat")
        if found["repetition_penalty"] <= 0:
            raise FlextronError(f"the GGUF file needs a number above 0 as {SAMPLING}penalty_repeat; convert it again")
        if last > 0 and found["repetition_penalty"] != 1:
            found["penalty_last_n"] = last
    for key in given.keys() - {"temp", "top_k", "top_p", "min_p", "penalty_last_n", "penalty_repeat", *_SILENT}:
        _log.warning("the GGUF file has the key %s, which is unknown and not read", shown(SAMPLING + key))
    return found


def _number(given: Mapping[str, Any], key: str) -> float:
    """A number, rounded to the seven digits that 32 bits hold."""
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FlextronError(f"the GGUF file needs a number as {SAMPLING}{key}, not {shown(value)}; convert it again")
    return float(f"{value:.7g}")


def sampling_metadata(defaults: GenerationDefaults) -> dict[str, Any]:
    """The keys of a file whose makers draw tokens in this way; llama.cpp's own defaults hold for all others."""
    named = {
        "temp": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "min_p": defaults.min_p,
        "penalty_repeat": defaults.repetition_penalty,
    }
    found = {key: value if key == "top_k" else float(value) for key, value in named.items() if value is not None}
    if "top_k" in found:
        found["top_k"] = max(0, found["top_k"])
    if "penalty_repeat" in found:
        found["penalty_last_n"] = _WHOLE_ANSWER
    return {SAMPLING + key: value for key, value in found.items()}
