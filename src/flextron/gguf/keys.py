"""Which metadata of a GGUF file changes what its model computes: each such key is read, or has to be neutral.

The list of keys is the `gguf` package's own, so that a key which a later version of the format adds is refused rather
than passed over. A key that nobody's list has is no reason to refuse a file, but to say so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from flextron.errors import FlextronError, UnsupportedModelError, shown

__all__ = ["Metadata"]

_log = logging.getLogger("flextron.model")
_PREFIX = "{arch}."
_READ = frozenset(
    {
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "use_parallel_residual"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
        *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.scale"),
        *("attention.sliding_window", "attention.causal", "embedding_length_out"),
        *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    }
)
"""Keys that `gguf.py` reads, or compares with what it can express."""
_GEMMA = frozenset({"final_logit_softcapping", "attention.sliding_window_pattern", "rope.freq_base_swa"})
_READ_OF: Mapping[str, frozenset[str]] = {
    "gemma2": _GEMMA | {"attn_logit_softcapping"},
    "gemma3": _GEMMA,
    "phi3": frozenset({"rope.scaling.attn_factor"}),
    "granite": frozenset({"embedding_scale", "residual_scale", "logit_scale"}),
}
"""Keys that are read in some architectures alone."""
_SILENT = frozenset(
    {
        # the embedding's rows count; these say what was done to the model, or how an embedding is made of its outputs
        *("vocab_size", "pooling_type", "rope.scaling.finetuned", "rope.scaling.original_context_length"),
        # of YaRN, which `rope.scaling.type` would name
        *("rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
        # of layers with a window or of experts, which other keys would name
        *("attention.sliding_window_pattern", "expert_gating_func", "expert_weights_norm", "expert_group_scale"),
        *("rope.freq_base_swa", "rope.dimension_count_swa", "attention.key_length_swa", "attention.value_length_swa"),
    }
)
"""Keys that change nothing in the models that are read."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "expert_weights_scale"), (0, 1)),
    "rope.scaling.attn_factor": (0, 1),
    # rows of queries and keys in the order of Meta's own files, which is what llama.cpp's converter writes
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Values that change nothing, of keys for which it is not only 0, false or an empty list."""
_REFUSED_TOKENIZER = (
    *("remove_extra_whitespaces", "precompiled_charsmap", "suppress_tokens"),
    *("normalizer.lowercase", "normalizer.strip_accents"),
)
"""Keys below `tokenizer.ggml.` that are refused: none of the tokenizers that are read does this."""


def _known() -> Iterator[str]:
    """Every key of the package's list that belongs to an architecture, without its name."""
    classes: list[type] = [gguf.Keys]
    while classes:
        for value in vars(classes.pop()).values():
            if isinstance(value, type):
                classes.append(value)
            elif isinstance(value, str) and value.startswith(_PREFIX):
                yield value.removeprefix(_PREFIX)


_KNOWN = frozenset(_known())


@dataclass(frozen=True, slots=True)
class Metadata:
    """A file's keys and values, asked for by type. Keys of the architecture come without its name."""

    path: Path
    arch: str
    values: Mapping[str, Any]

    def check(self) -> None:
        """Refuse keys that would change the result and are not read; tell of keys that are not known.

        Raises:
            UnsupportedModelError: there is one; named with its value.
        """
        for key, value in self.values.items():
            name = key.removeprefix(f"{self.arch}.")
            if name == key or name in _READ_OF.get(self.arch, ()):
                continue
            if name in _READ or name in _SILENT or _is_neutral(name, value):
                continue
            if name not in _KNOWN:
                _log.warning("%s has the key %s, which is unknown and not read", self.path, shown(key))
                continue
            raise UnsupportedModelError(f"{self.path} is not a plain {self.arch} model: {key[:60]} is {shown(value)}")
        for name in _REFUSED_TOKENIZER:
            key = f"tokenizer.ggml.{name}"
            if not _is_neutral(name, self.values.get(key, 0)):
                raise UnsupportedModelError(f"{self.path} has a tokenizer that is not supported: {key} is set")

    def get(self, name: str, default: Any = None) -> Any:
        """A value of the architecture; of a list with one entry a layer, all the same, that entry."""
        value = self.values.get(f"{self.arch}.{name}", default)
        if isinstance(value, np.ndarray):
            if not value.size or (value != value[0]).any():
                raise UnsupportedModelError(
                    f"{self.path} has layers that differ in {self.arch}.{name}; only models of equal layers are read"
                )
            return value[0].item()
        return value

    def flags(self, name: str, num_layers: int) -> list[bool] | None:
        """Yes or no for each layer; None where the value is no list."""
        value = self.values.get(f"{self.arch}.{name}")
        if not isinstance(value, np.ndarray):
            return None
        if value.dtype != np.bool_ or value.shape != (num_layers,):
            raise self._wrong(name, f"true or false for each of {num_layers} layers", value.tolist())
        return [bool(entry) for entry in value]

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number, at least 1."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise self._wrong(name, "a whole number of at least 1", value)
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above 0, rounded to the seven digits that 32 bits hold."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._wrong(name, "a number above 0", value)
        return float(f"{value:.7g}")

    def flag(self, name: str, default: bool | None = None) -> bool:
        """Yes or no."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def text(self, name: str, default: str) -> str:
        """A text."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a text", value)
        return value

    def has(self, name: str) -> bool:
        """Whether there is such a key."""
        return f"{self.arch}.{name}" in self.values

    def _wrong(self, name: str, wanted: str, value: Any) -> FlextronError:
        found = "is missing" if value is None else f"is {shown(value)}"
        return FlextronError(f"{self.path} needs {wanted} as {self.arch}.{name}, which {found}; convert it again")


def _is_neutral(name: str, value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return not value.any()
    return not value or value in _NEUTRAL.get(name, ())
