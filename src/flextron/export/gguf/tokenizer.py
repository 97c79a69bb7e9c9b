"""A tokenizer as keys of a GGUF file: the reverse of `flextron.gguf.tokenizer`.

The two kinds that llama.cpp shares with the supported families are written: byte-level BPE, whose rule for splitting
text is recognised by what it does to a text full of borderline cases, and SentencePiece, whose scores follow from the
order of the merges. What was written is read back and compared with the original on texts, so that a tokenizer which
GGUF cannot express is refused rather than written in part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flextron.errors import FlextronError
from flextron.gguf.rules import Rule, rule_name
from flextron.gguf.tokenizer import tokenizer_from_metadata

__all__ = ["tokenizer_metadata"]

_KEYS = gguf.Keys.Tokenizer
_SPACE = "\u2581"
_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \nHello, world! it's we'Re I'M 'tis 3 33 333 3333 33333 3.3 3..3 "
    "1,000.50$ +=<>^~| \u00c7a caf\u00e9 cafe\u0301 na\u00efve \u4e2d\u6587\u5b57 \u0440\u0443\u0441 "
    "\u1780\u17b6 \U0001f642\u200d\u2642\ufe0f x_y __init__(self): ``` '''''' \"\"\" ------ ====== \u2026 ??!! "
    "a\r\nb\r\n\r\n  c\td  <|no_token|> "
)
"""A text on which the rules differ: digits, contractions, accents in both forms, signs, white space of all kinds."""
_PROBES = (_PROBE, *_PROBE.split(" "), "Once upon a time", " leading", "trailing ", "Don't 2024!")
_UNREADABLE = "export to hf, and convert that with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a `tokenizer.json` holds."""

    vocab: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    model: Mapping[str, Any]


def tokenizer_metadata(
    tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int, ends: Iterable[int], arch: str
) -> dict[str, Any]:
    """Keys and values.

    Args:
        tokenizer: the model's; None for a file of token ids alone.
        vocab_size: rows of the embedding; tokens that the tokenizer lacks are written as unused.
        ends: ids that end an answer.
        arch: GGUF's name of the architecture.

    Raises:
        FlextronError: GGUF has no form for the tokenizer.
    """
    if tokenizer is None:
        return {_KEYS.MODEL: "no_vocab"}
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise FlextronError(f"the model's tokenizer has no tokenizer.json, from which GGUF is written; {_UNREADABLE}")
    parts = _parts(tokenizer)
    tokens, types = _tokens(tokenizer, parts, vocab_size)
    out: dict[str, Any] = {_KEYS.LIST: tokens, _KEYS.TOKEN_TYPE: types}
    if parts.model.get("byte_fallback"):
        out |= {_KEYS.MODEL: "llama", _KEYS.PRE: "default", _KEYS.SCORES: _scores(tokens, parts)}
        out[_KEYS.ADD_PREFIX] = _begins_with_space(tokenizer)
    else:
        out |= {_KEYS.MODEL: "gpt2", _KEYS.PRE: _rule(tokenizer, parts), _KEYS.MERGES: _merges(parts)}
    out |= _special(tokenizer, list(ends), vocab_size)
    if tokenizer.chat_template is not None:
        out[_KEYS.CHAT_TEMPLATE] = tokenizer.chat_template
    _check(tokenizer, out, arch)
    return out


def _parts(tokenizer: PreTrainedTokenizerFast) -> _Parts:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        raise FlextronError(f"the model's tokenizer is of kind {model['type']}, and only BPE is written; {_UNREADABLE}")
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return _Parts(model["vocab"], [(left, right) for left, right in pairs], model)


def _tokens(tokenizer: PreTrainedTokenizerFast, parts: _Parts, vocab_size: int) -> tuple[list[str], list[int]]:
    """Each id's token and `gguf.TokenType`."""
    if len(tokenizer) > vocab_size:
        raise FlextronError(
            f"the tokenizer has {len(tokenizer)} tokens and the model an embedding of {vocab_size}; they do not belong "
            "together"
        )
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added = {i: token.special for i, token in tokenizer.added_tokens_decoder.items()}
    unknown = parts.model.get("unk_token") if parts.model.get("byte_fallback") else None
    tokens, types = [], []
    for i in range(vocab_size):
        token = by_id.get(i)
        tokens.append(f"[PAD{i}]" if token is None else token)
        types.append(int(_type(token, added.get(i), parts, unknown)))
    return tokens, types


def _type(token: str | None, special: bool | None, parts: _Parts, unknown: str | None) -> gguf.TokenType:
    """The type of a token; `special` is None for those that were not added."""
    if token is None:
        return gguf.TokenType.UNUSED
    if token == unknown:
        return gguf.TokenType.UNKNOWN
    if special is not None:
        return gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    is_byte = parts.model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL


def _scores(tokens: Sequence[str], parts: _Parts) -> list[float]:
    """Scores by which llama.cpp merges in the order of the merges: what is merged earlier scores higher."""
    ranks: dict[str, int] = {}
    for left, right in parts.merges:
        ranks.setdefault(left + right, len(ranks))
    return [float(-ranks[token]) if token in ranks else 0.0 for token in tokens]


def _merges(parts: _Parts) -> list[str]:
    """Merges as texts; a space within a token of them is written as llama.cpp does, as its byte's letter."""
    return [" ".join(side.replace(" ", "\u0120") for side in pair) for pair in parts.merges]


def _rule(tokenizer: PreTrainedTokenizerFast, parts: _Parts) -> str:
    """Name of the rule that splits text as the tokenizer does."""
    backend = tokenizer.backend_tokenizer
    normalizer, split = backend.normalizer, backend.pre_tokenizer

    def is_same(rule: Rule) -> bool:
        if split is None or bool(parts.model.get("ignore_merges")) != rule.takes_words:
            return False
        composed = "\u00e9" if rule.is_composed else "e\u0301"
        if ("e\u0301" if normalizer is None else normalizer.normalize_str("e\u0301")) != composed:
            return False
        return bool(rule.split().pre_tokenize_str(_PROBE) == split.pre_tokenize_str(_PROBE))

    name = rule_name(is_same)
    if name is None:
        raise FlextronError(f"the model's tokenizer splits text by a rule that has no name in GGUF here; {_UNREADABLE}")
    return name


def _begins_with_space(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a text begins as if a space stood before it."""
    return tokenizer.tokenize("a")[0].startswith(_SPACE)


def _special(tokenizer: PreTrainedTokenizerFast, ends: list[int], vocab_size: int) -> dict[str, Any]:
    """Ids of special tokens, and whether texts begin and end with them."""
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(ends), None)
    turns = [i for i in ends if i != eos and i < vocab_size]
    ids = {
        _KEYS.BOS_ID: tokenizer.bos_token_id,
        _KEYS.EOS_ID: eos,
        _KEYS.UNK_ID: tokenizer.unk_token_id,
        _KEYS.PAD_ID: tokenizer.pad_token_id,
        _KEYS.EOT_ID: turns[0] if turns else None,
        _KEYS.EOM_ID: turns[1] if len(turns) > 1 else None,
    }
    out: dict[str, Any] = {key: i for key, i in ids.items() if i is not None}
    plain, framed = (tokenizer("a", add_special_tokens=own)["input_ids"] for own in (False, True))
    out[_KEYS.ADD_BOS] = len(framed) > len(plain) and framed[0] == tokenizer.bos_token_id
    out[_KEYS.ADD_EOS] = len(framed) > len(plain) and framed[-1] == tokenizer.eos_token_id
    return out


def _check(tokenizer: PreTrainedTokenizerFast, written: Mapping[str, Any], arch: str) -> None:
    """Read back what was written, and compare.

    Raises:
        FlextronError: it gives other tokens.
    """
    template = written.get(_KEYS.CHAT_TEMPLATE)
    named = template if isinstance(template, dict) else {}
    values = {key: value for key, value in written.items() if not (named and key == _KEYS.CHAT_TEMPLATE)}
    again = tokenizer_from_metadata(
        {gguf.Keys.General.ARCHITECTURE: arch, **values}, max_length=tokenizer.model_max_length
    )
    assert again is not None
    texts = [*_PROBES, *(f"a{token.content}b" for token in tokenizer.added_tokens_decoder.values())]
    if written[_KEYS.MODEL] == "llama":
        # programs differ in where SentencePiece puts its space: before a space, and after a special token
        texts = [text for text in _PROBES if not text.startswith(" ")]
    for text in texts:
        if again(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise FlextronError(
                f"the model's tokenizer cannot be expressed in GGUF: it would read {text[:40]!r} as other tokens; "
                f"{_UNREADABLE}"
            )
