"""Building a fast tokenizer from a GGUF file's metadata, which has tokens and merges but no `tokenizer.json`.

Two kinds exist. Byte-level BPE ("gpt2") stores its merges, and names the rule that splits text before them.
SentencePiece ("llama") stores a score per token instead; merges follow from those: the pair whose union scores best is
merged first, and among equals the one with the lower id, in whose order SentencePiece learnt them.

Special ids, lists that are too short and tokens that occur twice are treated as llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flextron.errors import FlextronError, shown
from flextron.gguf.rules import Rule, rule_of
from flextron.gguf.vocabulary import Vocabulary, read_vocabulary

__all__ = ["tokenizer_from_metadata"]

_KEYS = gguf.Keys.Tokenizer
_ARCHITECTURE = gguf.Keys.General.ARCHITECTURE
_SPACE = "\u2581"
"""SentencePiece's visible stand-in for a space."""
_LONGEST_PIECE = 4096
"""Characters of an ordinary SentencePiece token; all its divisions in two are tried."""


def tokenizer_from_metadata(metadata: Mapping[str, Any], *, max_length: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a GGUF file's metadata describes; None where it describes none.

    Args:
        metadata: the file's keys and values.
        max_length: the model's context in tokens.

    Raises:
        FlextronError: the kind of tokenizer, or the rule by which it splits text, is unknown; or its lists are damaged.
    """
    vocabulary = read_vocabulary(metadata)
    if vocabulary is None:
        return None
    if vocabulary.kind == "gpt2":
        rule = rule_of(metadata.get(_KEYS.PRE), metadata.get(_ARCHITECTURE))
        tokenizer, begins = _byte_level(metadata, vocabulary, rule), rule.takes_words
    else:
        tokenizer, begins = _sentencepiece(metadata, vocabulary), True
    # SentencePiece and Llama 3 begin with BOS unless the file says otherwise; old files do not say.
    bos = _framing(metadata, _KEYS.ADD_BOS, begins, vocabulary, "bos_token")
    eos = _framing(metadata, _KEYS.ADD_EOS, False, vocabulary, "eos_token")
    _add_tokens(tokenizer, vocabulary)
    _add_template(tokenizer, bos, eos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(metadata),
        **{name: vocabulary.tokens[i] for name, i in vocabulary.special.items()},
    )


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise FlextronError(f"the GGUF file needs true or false as {key}, not {shown(value)}; convert the model again")
    return value


def _framing(metadata: Mapping[str, Any], key: str, default: bool, vocabulary: Vocabulary, name: str) -> str | None:
    """The token that every text begins or ends with; None for none."""
    if not _flag(metadata, key, default):
        return None
    if name not in vocabulary.special:
        raise FlextronError(
            f"the GGUF file's tokenizer adds its {name} to every text ({key}) and does not say which that is; "
            "convert the model again"
        )
    return vocabulary.tokens[vocabulary.special[name]]


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template, or templates by name, where a file has more than the default one."""
    prefix = f"{_KEYS.CHAT_TEMPLATE}."
    named = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    default = metadata.get(_KEYS.CHAT_TEMPLATE)
    if default is not None:
        named["default"] = default
    if not all(isinstance(template, str) for template in named.values()):
        raise FlextronError("the GGUF file has a chat template that is no text; convert the model again")
    return default if named.keys() <= {"default"} else named


def _byte_level(metadata: Mapping[str, Any], vocabulary: Vocabulary, rule: Rule) -> Tokenizer:
    if _flag(metadata, _KEYS.ADD_PREFIX, False):
        raise FlextronError(
            f"the GGUF file sets {_KEYS.ADD_PREFIX} for a byte-level tokenizer, which programs understand in different "
            "ways; use the Hugging Face checkpoint instead"
        )
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=_stored_merges(metadata, vocab), ignore_merges=rule.takes_words))
    if rule.is_composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _stored_merges(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of tokens whose union is a token, in the order in which they are merged."""
    stored = metadata.get(_KEYS.MERGES)
    if not isinstance(stored, list) or (not stored and any(len(token) > 1 for token in vocab)):
        raise FlextronError(f"the GGUF file's tokenizer has no merges ({_KEYS.MERGES}); convert the model again")
    merges = []
    for merge in stored:
        left, _, right = str(merge).partition(" ")
        if not (left in vocab and right in vocab and left + right in vocab):
            raise FlextronError(
                f"the GGUF file's tokenizer has the merge {shown(merge)}, which does not join two of its tokens to a "
                "third; convert the model again"
            )
        merges.append((left, right))
    return merges


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> Tokenizer:
    tokens = vocabulary.tokens
    unknown = vocabulary.special.get("unk_token")
    tokenizer = Tokenizer(
        BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=list(_merges_by_score(vocabulary, _scores(metadata, len(tokens)))),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = _flag(metadata, _KEYS.ADD_PREFIX, True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if has_prefix else spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if has_prefix else [])
    )
    return tokenizer


def _scores(metadata: Mapping[str, Any], size: int) -> Sequence[float]:
    """Score of each token; all 0 if the file has none."""
    given = metadata.get(_KEYS.SCORES)
    if given is None:
        return [0.0] * size
    scores = np.asarray(given)
    if scores.ndim != 1 or scores.dtype.kind not in "if" or len(scores) < size or not np.isfinite(scores).all():
        raise FlextronError(
            f"the GGUF file's {_KEYS.SCORES} are not one number for each of its {size} tokens; convert the model again"
        )
    return [float(score) for score in scores[:size]]


def _merges_by_score(vocabulary: Vocabulary, scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """All pairs of tokens whose union is a token, the best-scoring union first. Only ordinary tokens take part."""
    ordinary = {
        token: score
        for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True)
        if kind == gguf.TokenType.NORMAL
    }
    if max(map(len, ordinary), default=0) > _LONGEST_PIECE:
        raise FlextronError(
            f"the GGUF file's tokenizer has a token of more than {_LONGEST_PIECE} characters; convert the model again"
        )
    for union in sorted(ordinary, key=lambda token: -ordinary[token]):
        for i in range(1, len(union)):
            if union[:i] in ordinary and union[i:] in ordinary:
                yield union[:i], union[i:]


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Mark the tokens that text is searched for before anything else: control tokens and users' own."""
    control, own = vocabulary.of_type(gguf.TokenType.CONTROL), vocabulary.of_type(gguf.TokenType.USER_DEFINED)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in own])


def _add_template(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Let every text begin with BOS and end with EOS, where given."""
    if bos is None and eos is None:
        return
    before, after = ([] if t is None else [t] for t in (bos, eos))
    special = [(t, tokenizer.token_to_id(t)) for t in {*before, *after}]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in after)],
        special_tokens=special,
    )
