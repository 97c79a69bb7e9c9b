"""The rules by which byte-level tokenizers split text before they merge, by the names that GGUF files have for them.

Each rule is built as the models of that name publish it in their `tokenizer.json`; `default` is llama.cpp's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from flextron.errors import FlextronError, shown

__all__ = ["Rule", "rule_name", "rule_of"]

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
"""GPT-2's split; what is left over between matches are single white spaces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How a tokenizer treats text before it merges."""

    split: Callable[[], pre_tokenizers.PreTokenizer]
    is_composed: bool = False
    """Whether accents are composed first (NFC)."""
    takes_words: bool = False
    """Whether a word which is a token is taken as it is, without going through its merges."""


def _by_regex(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Split by one pattern after the other; matches and what lies between them are pieces."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _default() -> pre_tokenizers.PreTokenizer:
    return _by_regex(r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _contractions(num_digits: str) -> pre_tokenizers.PreTokenizer:
    """Llama 3's and Qwen 2's split: contractions, words with one sign before them, digits, punctuation, white space."""
    return _by_regex(
        "|".join(
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
    )


_GPT2 = Rule(split=_gpt2)
_NEOX = Rule(split=_gpt2, is_composed=True)
_LLAMA3 = Rule(split=lambda: _contractions("{1,3}"), takes_words=True)
_QWEN2 = Rule(split=lambda: _contractions(""), is_composed=True)
_RULES: Mapping[str, Rule] = {
    "default": Rule(split=_default),
    "gpt-2": _GPT2,
    "olmo": _NEOX,
    "smollm": Rule(split=_smollm),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""Rules by `tokenizer.ggml.pre`. The converter writes "olmo" for GPT-NeoX and Pythia, whose rule is the same."""
_OF_ARCHITECTURES: Mapping[str, Rule] = {"gpt2": _GPT2, "gptneox": _NEOX, "qwen2": _QWEN2, "qwen3": _QWEN2}
"""Rules of files from before 2024, which name none: all models of these architectures share one. Llama's do not."""


def rule_of(name: object, arch: object) -> Rule:
    """The rule that a file names, or that its architecture implies.

    Raises:
        FlextronError: the name is unknown, or there is none and models of the architecture differ.
    """
    if name is None and arch in _OF_ARCHITECTURES:
        return _OF_ARCHITECTURES[str(arch)]
    if isinstance(name, str) and name in _RULES:
        return _RULES[name]
    what = f"splits text by the unknown rule {shown(name)}"
    if name is None:
        what = "does not say by which rule it splits text"
    raise FlextronError(
        f"the GGUF file's tokenizer {what}; known are {', '.join(_RULES)}: use the Hugging Face checkpoint instead"
    )


def rule_name(is_same: Callable[[Rule], bool]) -> str | None:
    """The first name whose rule passes; None if no rule does."""
    return next((name for name, rule in _RULES.items() if is_same(rule)), None)
