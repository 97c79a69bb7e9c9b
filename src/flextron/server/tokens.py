"""How single tokens are shown beside log-probabilities: as text, and as the bytes they really are."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

__all__ = ["TokenNames"]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_of_sign() -> dict[str, int]:
    """Byte-level tokenizers write every byte as one visible character; which byte a character stands for."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


class TokenNames:
    """Names of a tokenizer's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the tokenizer."""
        self._tokenizer, self._signs = tokenizer, _byte_of_sign()

    def text(self, token: int) -> str:
        """The token alone; bytes that are no text are replacement characters."""
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def raw(self, token: int) -> bytes:
        """Its bytes."""
        text = self.text(token)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode()
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if match := _BYTE.fullmatch(piece):
            return bytes.fromhex(match[1])
        if all(sign in self._signs for sign in piece):
            found = bytes(self._signs[sign] for sign in piece)
            if found.decode(errors="replace") == text:
                return found
        return text.encode()

    def key(self, token: int) -> str:
        """A name that no other token's bytes share, as OpenAI writes it."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
