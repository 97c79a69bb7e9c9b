"""Prompts of a wanted length that no cache has seen: words drawn at random.

The words are short and common, so that tokenizers of the usual kinds make one token of each. That is an approximation;
the server's `usage` tells what it really was. With a tokenizer at hand the length is exact, or, where it cuts these
words in several tokens, as near as some tries get.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Protocol

from flextron.errors import FlextronError

__all__ = ["Counter", "PromptMaker", "token_counter"]

_COMMON = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city community name president team minute idea body information back parent face
others level office door health person art war history party result change morning reason research girl guy moment air
teacher force education foot boy age policy music market sense nation plan college interest death course experience
effect use class control field development role effort rate heart drug show leader light voice wife police mind price
report decision son view town road form difference value action model season society tax director position player
record paper space ground event official matter center couple site project activity star table need court oil
situation cost industry figure street image phone data picture practice piece land product doctor wall
"""
_WORDS = tuple(_COMMON.split())

_MAX_TRIES = 32


class Counter(Protocol):
    """Counts the tokens of a text as the server will."""

    def __call__(self, text: str, /) -> int:
        """The number of tokens."""
        ...


def token_counter(name: str) -> Counter:
    """A counter from a `tokenizer.json`: a file, a directory that holds one, or an id on the Hugging Face hub.

    Raises:
        FlextronError: there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer  # loads native code, for this option alone

    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file)) if file.exists() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises plain Exception for all that goes wrong
        raise FlextronError(f"{name} holds no tokenizer.json that can be read ({error})") from error

    def count(text: str, /) -> int:
        return len(tokenizer.encode(text).ids)

    return count


_LONGEST_PREFIX = 10_000_000


class PromptMaker:
    """Makes prompts; number `k` depends on the seed, `k` and the length alone."""

    def __init__(self, *, seed: int = 0, shared_prefix: int = 0, count: Counter | None = None) -> None:
        """Draw the shared prefix.

        Args:
            seed: seed of all words.
            shared_prefix: tokens that all prompts begin with, as far as their lengths allow.
            count: counts tokens; without it a word counts as one.

        Raises:
            FlextronError: the prefix is negative, or longer than any context.
        """
        if not 0 <= shared_prefix <= _LONGEST_PREFIX:
            raise FlextronError(f"the shared prefix must have 0 to {_LONGEST_PREFIX:,} tokens, not {shared_prefix:,}")
        self._seed = seed
        self._count = count
        self._prefix = self._drawn("prefix", shared_prefix, []) if shared_prefix else []

    def __call__(self, index: int | str, num_tokens: int) -> str:
        """The prompt of request `index`, with `num_tokens` tokens, of which at least one word is its own."""
        return " ".join(self._drawn(index, num_tokens, self._prefix[: num_tokens - 1]))

    def _drawn(self, index: int | str, num_tokens: int, prefix: list[str]) -> list[str]:
        """`prefix` and then random words, `num_tokens` tokens in all."""
        draws = random.Random(f"prompt {self._seed} {index}")
        words = prefix + draws.choices(_WORDS, k=max(1, num_tokens - len(prefix)))
        if self._count is None:
            return words
        # A word may be several tokens, and the tokenizer may add its own: take words away and draw others, until it
        # fits. Taking some more than needed keeps the search from going in circles.
        best = words
        nearest: float = math.inf
        for _ in range(_MAX_TRIES):
            found = self._count(" ".join(words))
            distance = abs(found - num_tokens)
            if distance < nearest:
                nearest, best = distance, words
            if distance == 0:
                break
            step = distance * len(words) // max(1, found)
            if found > num_tokens:
                words = words[: max(len(prefix) + 1, len(words) - step - draws.randint(1, 3))]
            else:
                words = words + draws.choices(_WORDS, k=max(1, step))
        return best
