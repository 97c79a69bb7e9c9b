"""Building a fast tokenizer from a GGUF file's metadata, which has tokens and merges but no `tokenizer.json`.

Two kinds exist. Byte-level BPE ("gpt2") stores its merges, and names the rule that splits text before them; each rule
is rebuilt as the models of that name publish it. SentencePiece ("llama") stores a score per token instead; merges
follow from those: the pair whose union scores best is merged first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flextron.errors import FlextronError

__all__ = ["tokenizer_from_metadata"]

_KEYS = gguf.Keys.Tokenizer
_SPACE = "\u2581"
"""SentencePiece's visible stand-in for a space."""


def _gpt2_rule() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_rule() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_rule()])


def _regex_rule(num_digits: str) -> pre_tokenizers.PreTokenizer:
    """Llama 3's and Qwen 2's split: contractions, words with one sign before them, digits, punctuation, white space."""
    pattern = "|".join(
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
            r"[^\r\n\p{L}\p{N}]?\p{L}+",
            rf"\p{{N}}{num_digits}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _llama3_rule() -> pre_tokenizers.PreTokenizer:
    return _regex_rule("{1,3}")


def _qwen2_rule() -> pre_tokenizers.PreTokenizer:
    return _regex_rule("")


_RULES: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2_rule,
    "gpt-2": _gpt2_rule,
    "olmo": _gpt2_rule,
    "smollm": _smollm_rule,
    "llama-bpe": _llama3_rule,
    "llama3": _llama3_rule,
    "llama-v3": _llama3_rule,
    "qwen2": _qwen2_rule,
    "deepseek-r1-qwen": _qwen2_rule,
}
"""By `tokenizer.ggml.pre`. The converter writes "olmo" for GPT-NeoX and Pythia, whose rule is the same."""
_NORMALIZED = frozenset({"olmo", "qwen2", "deepseek-r1-qwen"})
"""Rules of tokenizers that compose accents first (NFC)."""
_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3"})
"""Rules of tokenizers that take a word which is a token as it is, without going through its merges."""


def tokenizer_from_metadata(metadata: Mapping[str, Any], *, max_length: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a GGUF file's metadata describes; None where it describes none.

    Args:
        metadata: the file's keys and values.
        max_length: the model's context in tokens.

    Raises:
        FlextronError: the kind of tokenizer, or the rule by which it splits text, is unknown; lists those known.
    """
    kind, tokens = metadata.get(_KEYS.MODEL), metadata.get(_KEYS.LIST)
    if not tokens or kind in (None, "none", "no_vocab"):
        return None
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise FlextronError(
            f"the GGUF file's tokenizer is of kind {kind!r}, and only {', '.join(builders)} can be read; "
            "use the Hugging Face checkpoint instead"
        )
    tokenizer = builders[kind](metadata, tokens)
    _add_tokens(tokenizer, tokens, _types(metadata, tokens))
    ids = {
        "bos_token": metadata.get(_KEYS.BOS_ID),
        "eos_token": metadata.get(_KEYS.EOS_ID),
        "unk_token": metadata.get(_KEYS.UNK_ID),
        "pad_token": metadata.get(_KEYS.PAD_ID),
    }
    named = {name: tokens[i] for name, i in ids.items() if i is not None}
    # SentencePiece and Llama 3 begin with BOS unless the file says otherwise; old files do not say.
    begins = metadata.get(_KEYS.ADD_BOS, kind == "llama" or metadata.get(_KEYS.PRE) in _WHOLE_WORDS)
    ends = metadata.get(_KEYS.ADD_EOS, False)
    _add_template(tokenizer, named.get("bos_token") if begins else None, named.get("eos_token") if ends else None)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get(_KEYS.CHAT_TEMPLATE),
        **named,
    )


def _types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Sequence[int]:
    """Each token's type; all are ordinary where the file says nothing."""
    return metadata.get(_KEYS.TOKEN_TYPE) or [gguf.TokenType.NORMAL] * len(tokens)


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    rule = metadata.get(_KEYS.PRE, "default")
    if rule not in _RULES:
        raise FlextronError(
            f"the GGUF file's tokenizer splits text by the unknown rule {rule!r}; known are {', '.join(_RULES)}: "
            "use the Hugging Face checkpoint instead"
        )
    merges = [(left, right) for left, right in (merge.split(" ") for merge in metadata.get(_KEYS.MERGES, ()))]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=rule in _WHOLE_WORDS))
    if rule in _NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _RULES[rule]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = metadata.get(_KEYS.UNK_ID, 0)
    merges = _merges_by_score(metadata, tokens)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    has_prefix = metadata.get(_KEYS.ADD_PREFIX, True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if has_prefix else spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if has_prefix else [])
    )
    return tokenizer


def _merges_by_score(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[tuple[str, str]]:
    """All pairs of tokens whose union is a token, the best-scoring union first. Only ordinary tokens take part."""
    scores = {
        token: score
        for token, score, kind in zip(tokens, metadata[_KEYS.SCORES], _types(metadata, tokens), strict=True)
        if kind == gguf.TokenType.NORMAL
    }
    merges = []
    for union in sorted(scores, key=lambda token: -scores[token]):
        pairs = [(union[:i], union[i:]) for i in range(1, len(union))]
        merges += [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
    return merges


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Mark the tokens that text is searched for before anything else: control tokens and users' own."""
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    own = [t for t, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.USER_DEFINED]
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
