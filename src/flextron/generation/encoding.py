"""Texts to token ids as the tokenizer itself makes them: with what it puts before and after every text.

Llama's and Mistral's tokenizers begin each text with a token of its own (BOS), and the models answer badly without.
Texts that a chat template has written hold such tokens already.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

__all__ = ["bad_words_ids", "beginning", "encode"]

_PROBES = ("a", "0", ".", "\n")


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text, by default as `tokenizer(text)` gives them."""
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=add_special_tokens)]


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text; nothing for GPT-2's, Qwen's and their like."""
    for probe in _PROBES:
        bare, framed = (encode(tokenizer, probe, add_special_tokens=add) for add in (False, True))
        starts = [i for i in range(len(framed)) if bare and framed[i : i + len(bare)] == bare]
        if starts:
            return framed[: starts[0]]
    return []


def bad_words_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Sequences of tokens that spell these words, at the beginning of a text and after a space."""
    found: list[tuple[int, ...]] = []
    for word in words:
        plain, spaced = (
            tuple(encode(tokenizer, before + word.lstrip(), add_special_tokens=False)) for before in ("", " ")
        )
        found.append(plain)
        # where the space is a token of its own, the plain word follows it
        if spaced[-len(plain) :] != plain:
            found.append(spaced)
    return tuple(dict.fromkeys(ids for ids in found if ids))
