"""How single tokens are shown beside log-probabilities: as text, and as the bytes they really are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

__all__ = ["TokenNames"]

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_AT_ONCE = 4096
"""How many tokens are decoded at once."""


def _byte_of_sign() -> dict[str, int]:
    """The byte that each character stands for: byte-level tokenizers write every byte as a visible character."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


class TokenNames:
    r"""Names of a tokenizer's tokens; no two tokens have the same.

    A token's text is what it adds to a text, so that a space at its beginning counts. Its name is its text. Where that
    is no text, or another token has it, the name is spelt in bytes (`bytes:\xe2`), as OpenAI's are; where that does
    not help either, and for ids beyond the vocabulary, it is the id (`token_id:7`), as vLLM writes it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Name all of the tokenizer's tokens."""
        pieces = {i: piece for piece, i in tokenizer.get_vocab().items()}
        ids = sorted(pieces)
        self._texts = dict(zip(ids, _texts(tokenizer, ids), strict=True))
        signs = _byte_of_sign()
        self._raw = {i: _raw(self._texts[i], pieces[i], signs) for i in ids}
        # of several tokens with the same bytes, the first that is not spelt as a byte has the plain name
        ids.sort(key=lambda i: (_BYTE.fullmatch(pieces[i]) is not None, i))
        self._names = _names({i: self._raw[i] for i in ids})

    def text(self, token: int) -> str:
        """What the token adds to a text; bytes that are no text are replacement characters."""
        return self._texts.get(token, "")

    def raw(self, token: int) -> bytes:
        """The token's bytes; none beyond the vocabulary."""
        return self._raw.get(token, b"")

    def key(self, token: int) -> str:
        """A name that no other token has."""
        return self._names.get(token) or _by_id(token)


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to a text: decoders treat the beginning of one in their own way."""
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    start = len(tokenizer.decode(before, clean_up_tokenization_spaces=False)) if before else 0
    texts: list[str] = []
    for i in range(0, len(ids), _AT_ONCE):
        sequences = [[*before, token] for token in ids[i : i + _AT_ONCE]]
        if backend is not None:
            texts += backend.decode_batch(sequences, skip_special_tokens=False)
        else:
            texts += [str(tokenizer.decode(s, clean_up_tokenization_spaces=False)) for s in sequences]
    return [text[start:] for text in texts]


def _raw(text: str, piece: str, signs: dict[str, int]) -> bytes:
    """A token's bytes, from its text and its form in the vocabulary."""
    if _BROKEN not in text:
        return text.encode()
    if match := _BYTE.fullmatch(piece):
        return bytes.fromhex(match[1])
    if all(sign in signs for sign in piece):
        found = bytes(signs[sign] for sign in piece)
        if found.decode(errors="replace") == text:
            return found
    return text.encode()


def _names(raws: Mapping[int, bytes]) -> dict[int, str]:
    """A name for each token; earlier tokens choose first."""
    names: dict[int, str] = {}
    taken = {""}
    for token, raw in raws.items():
        name = _plain(raw)
        if name in taken and (name := _spelt(raw)) in taken:
            name = _by_id(token)
        names[token] = name
        taken.add(name)
    return names


def _plain(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _spelt(raw)


def _spelt(raw: bytes) -> str:
    return "bytes:" + "".join(f"\\x{b:02x}" for b in raw) if raw else ""


def _by_id(token: int) -> str:
    return f"token_id:{token}"
