"""The tokens of a GGUF file: their types, which of them are special, and which end an answer.

Files name ids that do not exist (padding as -1, mostly); like llama.cpp we say so and go on without them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from flextron.errors import FlextronError, shown

__all__ = ["Vocabulary", "end_ids", "read_vocabulary", "special_ids"]

_log = logging.getLogger("flextron.model")
_KEYS = gguf.Keys.Tokenizer
_KINDS, _NO_KINDS = ("gpt2", "llama"), ("none", "no_vocab")
_SPECIAL = {"bos_token": _KEYS.BOS_ID, "eos_token": _KEYS.EOS_ID, "unk_token": _KEYS.UNK_ID, "pad_token": _KEYS.PAD_ID}
"""Special tokens by `transformers`' names."""
_SENTENCEPIECE = {"unk_token": 0, "bos_token": 1, "eos_token": 2}
"""What SentencePiece's ids are where a file does not say."""
_ENDS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>"),
        *("<end_of_turn>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
"""Tokens that end a turn or a text whatever the metadata says of them, as in llama.cpp: many files name one end of
several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Tokens by id."""

    kind: str
    """"gpt2" for byte-level BPE, "llama" for SentencePiece."""
    tokens: list[str]
    """No two are equal, none is empty."""
    types: list[int]
    """One a token, `gguf.TokenType`'s."""
    special: Mapping[str, int]
    """Ids by `transformers`' names (`bos_token`); all within the vocabulary."""

    def of_type(self, kind: gguf.TokenType) -> list[str]:
        """Tokens of a type, in the order of their ids."""
        return [token for token, own in zip(self.tokens, self.types, strict=True) if own == kind]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary; None where the file has none.

    Raises:
        FlextronError: its kind is unknown, tokens occur twice, or the list of types is too short.
    """
    kind, given = metadata.get(_KEYS.MODEL), metadata.get(_KEYS.LIST)
    if given is None or kind is None or (isinstance(kind, str) and kind in _NO_KINDS):
        return None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise FlextronError(
            f"the GGUF file's tokenizer is of kind {shown(kind)}, and only {', '.join(_KINDS)} can be read; "
            "use the Hugging Face checkpoint instead"
        )
    if not isinstance(given, list) or not given or not all(isinstance(token, str) for token in given):
        raise FlextronError(f"the GGUF file's {_KEYS.LIST} are no list of texts; convert the model again")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(given)]
    seen: set[str] = set()
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise FlextronError(f"the GGUF file's tokenizer has the token {shown(twice)} twice; convert the model again")
    types = _types(metadata.get(_KEYS.TOKEN_TYPE), tokens)
    return Vocabulary(kind=kind, tokens=tokens, types=types, special=special_ids(metadata, len(tokens)))


def _types(given: Any, tokens: list[str]) -> list[int]:
    """Each token's type; all are ordinary where the file says nothing. Ends of a turn are always control tokens."""
    kinds = np.asarray([gguf.TokenType.NORMAL] * len(tokens) if given is None else given)
    if kinds.ndim != 1 or kinds.dtype.kind not in "iu" or len(kinds) < len(tokens):
        raise FlextronError(
            f"the GGUF file's {_KEYS.TOKEN_TYPE} is not one number for each of its {len(tokens)} tokens; "
            "convert the model again"
        )
    return [int(gguf.TokenType.CONTROL) if t in _ENDS else int(k) for t, k in zip(tokens, kinds, strict=False)]


def special_ids(metadata: Mapping[str, Any], size: int) -> dict[str, int]:
    """Ids of special tokens by `transformers`' names; those that do not exist are left out, with a warning.

    Args:
        metadata: the file's keys and values.
        size: size of the vocabulary.
    """
    kind = metadata.get(_KEYS.MODEL)
    defaults = _SENTENCEPIECE if isinstance(kind, str) and kind == "llama" else {}
    found = {name: _id(metadata, key, size, defaults.get(name)) for name, key in _SPECIAL.items()}
    return {name: i for name, i in found.items() if i is not None}


def end_ids(metadata: Mapping[str, Any], size: int, end_of_text: int | None) -> list[int]:
    """Ids of the tokens that end an answer: of the text first, then those of a turn."""
    turns = [_id(metadata, key, size, None) for key in (_KEYS.EOT_ID, _KEYS.EOM_ID)]
    tokens = metadata.get(_KEYS.LIST)
    known = [i for i, t in enumerate(tokens) if t in _ENDS] if isinstance(tokens, list) else []
    return list(dict.fromkeys(i for i in (end_of_text, *turns, *known) if i is not None))


def _id(metadata: Mapping[str, Any], key: str, size: int, default: int | None) -> int | None:
    """An id of the metadata, where it is one of the vocabulary's; else the default, where that is."""
    found = metadata.get(key)
    if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < size:
        return found
    default = default if default is not None and default < size else None
    if found is not None:
        _log.warning("the GGUF file's %s is %s, no token of its %d; it is ignored", key, shown(found), size)
    return default
