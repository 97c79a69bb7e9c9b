"""What requests bring as text, made into tokens and grammars in threads of their own, so that nobody else waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError, LongPromptError
from flextron.generation.constraints import Constraint, Grammars, Kind
from flextron.generation.encoding import bad_words_ids, encode
from flextron.generation.templates import ChatTemplate
from flextron.model.config import DecoderConfig
from flextron.serving.errors import bad_request

__all__ = ["Prompts"]

_MOST_CHARS = 1_000_000
"""The most characters of a prompt, for models with a short context."""
_MOST_TEMPLATES = 8
"""How many chat templates run at once."""


class Prompts:
    """The tokenizer of a server; its methods belong to the event loop."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DecoderConfig, ends: Sequence[int]) -> None:
        """Take the tokenizer, the model's sizes, and the tokens that end an answer."""
        self._tokenizer, self._num_tokens, self._ends = tokenizer, config.vocab_size, ends
        # twice the longest token, in case that the tokenizer drops characters; but a vocabulary may have very long
        # ones, and a tokenizer takes a second for half a million characters
        longest, positions = max(map(len, tokenizer.get_vocab())), config.max_position_embeddings
        self.most_chars = min(2 * longest * positions, max(_MOST_CHARS, 16 * positions))
        """Most characters of a prompt."""
        # one thread: a tokenizer's settings are not safe to use from several
        self._encoder = ThreadPoolExecutor(1, "flextron-tokenizer")
        # several: a chat template may take seconds before it is given up
        self._templates = ThreadPoolExecutor(_MOST_TEMPLATES, "flextron-templates")
        self._grammars: Grammars | None = None

    def start(self) -> None:
        """Get ready to write chat templates, if there is one."""
        if self._tokenizer.chat_template:
            self._templates.submit(ChatTemplate.warm_up)

    def stop(self) -> None:
        """End the threads. Those of chat templates end by themselves."""
        self._encoder.shutdown()
        self._templates.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str | Callable[[], str], *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, or of the text that a function returns (such as a chat template).

        Args:
            text: the text or the function.
            add_special_tokens: whether it begins as the tokenizer begins a text; chat templates write that themselves.

        Raises:
            PromptError: the text cannot fit into the model, whatever its tokens are.
        """
        loop = asyncio.get_running_loop()
        written = text if isinstance(text, str) else await loop.run_in_executor(self._templates, text)

        def run() -> list[int]:
            if len(written) > self.most_chars:
                raise LongPromptError(
                    f"the prompt has {len(written)} characters, more than the model has positions for; shorten it"
                )
            return encode(self._tokenizer, written, add_special_tokens=add_special_tokens)

        return await loop.run_in_executor(self._encoder, run)

    async def bad_words_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids that spell these words."""
        if not words:
            return ()
        return await asyncio.get_running_loop().run_in_executor(self._encoder, bad_words_ids, self._tokenizer, words)

    async def constraint(self, kind: Kind, given: Any, param: str) -> Constraint:
        """A grammar at its start.

        Args:
            kind: kind of the grammar.
            given: what `Grammars.constraint` takes.
            param: key of the body that names it.

        Raises:
            ApiError: it cannot be followed.
        """

        def make() -> Constraint:
            if self._grammars is None:
                self._grammars = Grammars(self._tokenizer, self._num_tokens, self._ends)
            return self._grammars.constraint(kind, given)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, make)
        except FlextronError as error:
            raise bad_request(str(error), param) from error
