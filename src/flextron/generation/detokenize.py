"""Text out of token ids as they come: no character in halves, nothing that a stop string may still take back.

A token may hold any bytes, so a character may span up to four of them. Text is given out at places where no character
is under way; each token is decoded in company of a few others only, so the work is linear in the answer's length.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError

__all__ = ["Detokenizer", "StopStrings", "continuation", "special_ids"]

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_WHOLE = (_BROKEN, "\u00ef\u00bf\u00bd")
"""How pieces end that really spell that character: as text, and in the signs of byte-level tokenizers."""
_MOST_TOKENS = 4
"""Tokens of one character: UTF-8 has at most four bytes."""
_MOST_CONTEXT = 64
"""Tokens of a prompt that are looked through for the last one with a text."""


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that are no text."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added.union(tokenizer.all_special_ids))


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text of an answer: what it adds to its prompt's."""
    stream = Detokenizer(tokenizer, prompt)
    return "".join([*map(stream.push, answer), stream.finish()])


class Detokenizer:
    """The text of one growing list of tokens; special tokens have none by default.

    The pieces make up what `tokenizer.decode` of prompt and answer adds to that of the prompt (both without special
    tokens, and without `clean_up_tokenization_spaces`, which would change text that is already out). A character whose
    first bytes are the prompt's is the prompt's. Where a tokenizer spells characters as byte tokens (`<0xE2>`) and a
    run of those is not UTF-8, its decoder breaks the whole run, this one not what is already out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """Start behind a prompt; without `skip_special_tokens` special tokens have a text."""
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer) if skip_special_tokens else frozenset()
        # what stands before the pending tokens, because decoders treat the beginning of a text in their own way
        self._before: list[int] = []
        self._num_before = 0
        self._pending: list[int] = []
        # the text of the first pending tokens where they are the prompt's
        self._prompts = ""
        self._num_out = 0
        self._begin([token for token in prompt[-2 * _MOST_CONTEXT :] if token not in self._special])

    def _begin(self, prompt: list[int]) -> None:
        """Find the last tokens of the prompt that have a text; those of an incomplete character stay pending."""
        for end in range(len(prompt), max(-1, len(prompt) - _MOST_TOKENS - 1), -1):
            for count in (1, 2, 4, 8, _MOST_CONTEXT):
                tokens = prompt[max(0, end - count) : end]
                text = self._decode(tokens) if tokens else ""
                if text and not text.endswith(_BROKEN):
                    self._before, self._num_before, self._pending = tokens, len(text), prompt[end:]
                    self._prompts = self._text(self._pending) if self._pending else ""
                    return
        self._before = prompt[-_MOST_CONTEXT:]
        self._num_before = len(self._decode(self._before)) if self._before else 0

    @property
    def position(self) -> int:
        """Characters before the next token's first; a character in halves counts when it is complete."""
        if not self._pending:
            return self._num_out
        text = self._own(self._text(self._pending))
        piece = str(self._tokenizer.convert_ids_to_tokens(self._pending[-1]))
        return self._num_out + len(text if piece.endswith(_WHOLE) else text.rstrip(_BROKEN))

    def push(self, token: int) -> str:
        """Add a token; the text that is certain now."""
        if token in self._special:
            return ""
        self._pending.append(token)
        text = self._text(self._pending)
        if text.endswith(_BROKEN):
            return self._out(self._cut(text)) if len(self._pending) > _MOST_TOKENS else ""
        if text:
            self._forget(len(self._pending))
        return self._out(text)

    def finish(self) -> str:
        """The rest, with a replacement character for what has stayed incomplete."""
        text = self._text(self._pending) if self._pending else ""
        self._pending.clear()
        return self._out(text)

    def _out(self, text: str) -> str:
        """The part of a certain text that is not the prompt's."""
        own = self._own(text)
        if text:
            self._prompts = ""
        self._num_out += len(own)
        return own

    def _own(self, text: str) -> str:
        """Without what is the prompt's: its broken bytes, or the one character that they became."""
        return text.removeprefix(self._prompts) if text.startswith(self._prompts) else text[1:]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def _text(self, tokens: list[int]) -> str:
        """Text of tokens that follow those before."""
        return self._decode([*self._before, *tokens])[self._num_before :]

    def _cut(self, text: str) -> str:
        """Give out what lies before the last place where no character is under way."""
        for i in range(len(self._pending) - 1, 0, -1):
            head = self._text(self._pending[:i])
            if head + self._text(self._pending[i:]) == text:
                self._forget(i)
                return head
        return ""

    def _forget(self, count: int) -> None:
        """Drop the first pending tokens, whose text is out; remember what can stand before the others."""
        done = self._pending[:count]
        del self._pending[:count]
        for tokens in (done[-1:], done):
            text = self._decode(tokens)
            # an incomplete character would join with what follows
            if text and not text.endswith(_BROKEN):
                self._before, self._num_before = tokens, len(text)
            if self._before:
                return


class StopStrings:
    """Ends a text at the first string that comes to an end in it; holds back what may become one."""

    def __init__(self, stop: Sequence[str] = (), *, includes_stop: bool = False) -> None:
        """Take the strings; with `includes_stop` the text keeps the one that ended it.

        Raises:
            FlextronError: one is empty.
        """
        if not all(stop):
            raise FlextronError("a stop string is empty; give at least one character")
        self._stop, self._includes = tuple(stop), includes_stop
        self._held = ""
        self.found: str | None = None
        """The one that was met; nothing is given out afterwards."""

    def push(self, text: str) -> str:
        """Add text; what is certain not to belong to a stop string."""
        if self.found is not None:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        ends = [(i + len(s), i, s) for s in self._stop if (i := text.find(s)) >= 0]
        if ends:
            # of those that end at the same place the longest counts
            end, begin, self.found = min(ends)
            self._held = ""
            return text[: end if self._includes else begin]
        keep = max(self._begun(text, s) for s in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """Characters at the end of the text with which a stop string begins."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
