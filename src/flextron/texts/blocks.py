"""Token blocks out: documents packed into equally long rows, and batches of them in a reproducible order.

Notable: a batch is a function of the seed and the step alone, so training resumes at any step without stored state,
and the ids of its blocks are known beforehand, which lets teacher outputs be cached by block.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.files import new_file
from flextron.generation.encoding import beginning

__all__ = ["TokenBlocks", "pack_tokens"]

_BATCH_CHARS = 1 << 18


def pack_tokens(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    context: int,
    vocab_size: int | None = None,
) -> NDArray[np.int32]:
    """Tokenize documents and lay them end to end, with one end-of-sequence token between two.

    Each document begins as the tokenizer begins a text: with BOS, for some. What it would put behind one is left out.

    Args:
        documents: read only as far as needed.
        tokenizer: must have an end-of-sequence token.
        num_tokens: how many tokens are wanted, separators included.
        context: length of a block in tokens.
        vocab_size: rows of the embedding that the tokens are for, if it is known; ids beyond it are refused.

    Returns:
        Tokens, a whole number of blocks of them: [num_blocks * context]. At most `num_tokens`, fewer if the documents
        run out.

    Raises:
        FlextronError: less than one block is wanted or there, the tokenizer has no end-of-sequence token, or a token
            has no row in the embedding.
    """
    if context < 1 or num_tokens < context:
        raise FlextronError(
            f"num_tokens must be at least one context, and that positive; got {num_tokens} and {context}"
        )
    if tokenizer.eos_token_id is None:
        raise FlextronError("the tokenizer has no end-of-sequence token to part documents; set its eos_token")
    pieces: list[NDArray[np.int32]] = []
    num_found = 0
    begin = beginning(tokenizer)
    for ids in _tokenized(documents, tokenizer):
        piece = np.array([*([tokenizer.eos_token_id] if pieces else []), *begin, *ids], dtype=np.int32)
        if vocab_size is not None:
            _check_ids(piece, tokenizer, vocab_size)
        pieces.append(piece)
        num_found += len(piece)
        if num_found >= num_tokens:
            break
    if num_found < context:
        raise FlextronError(
            f"the documents hold {num_found} tokens, less than one context of {context};"
            " add text or shorten the context"
        )
    num_used = min(num_found, num_tokens) // context * context
    return np.concatenate(pieces)[:num_used]


def _check_ids(ids: NDArray[np.int32], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """See that each token has a row in the embedding: tokens may have been added without resizing it."""
    highest = int(ids.max())
    if highest >= vocab_size:
        raise FlextronError(
            f"the text holds the token {tokenizer.convert_ids_to_tokens(highest)!r} of id {highest}, but the model's "
            f"vocabulary has {vocab_size} tokens; resize its embedding, or use the tokenizer that it was trained with"
        )


def _tokenized(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each document that has any."""
    for batch in _batched(documents):
        # verbose=False: a document may well be longer than the model's context, since it is cut into blocks.
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from (ids for ids in encoded["input_ids"] if ids)


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    """Groups of documents of about equal size in characters, so that neither long nor short ones hold things up."""
    batch: list[str] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_blocks: int) -> NDArray[np.int64]:
    """The order of the blocks in one epoch; kept for the next steps of the same epoch, for it takes O(num_blocks)."""
    order = np.random.default_rng((seed, epoch)).permutation(num_blocks)
    order.setflags(write=False)
    return order


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenBlocks:
    """Rows of tokens, handed out in batches: every row once an epoch, in an order drawn anew for each."""

    tokens: NDArray[np.int32]
    """Token ids, [num_blocks, context]; possibly a read-only map of a file."""
    seed: int = 0
    """Seed of the order, at least 0."""

    def __post_init__(self) -> None:
        """Refuse what holds no block, and seeds that are none."""
        if self.tokens.ndim != 2 or self.tokens.dtype != np.int32 or not self.tokens.size:
            raise FlextronError(
                f"token blocks are int32 rows of one length, not {self.tokens.dtype} of shape {self.tokens.shape};"
                " make them with pack_tokens"
            )
        if self.seed < 0:
            raise FlextronError(f"the seed must be at least 0, not {self.seed}")

    @classmethod
    def from_tokens(cls, tokens: NDArray[np.int32], *, context: int, seed: int = 0) -> TokenBlocks:
        """Cut what `pack_tokens` returned, [num_blocks * context], into blocks.

        Raises:
            FlextronError: the tokens are not a whole number of blocks.
        """
        if context < 1 or len(tokens) % context:
            raise FlextronError(f"{len(tokens)} tokens are no whole number of blocks of {context}; pack them for it")
        return cls(tokens=tokens.reshape(-1, context), seed=seed)

    @property
    def num_blocks(self) -> int:
        """Rows."""
        return int(self.tokens.shape[0])

    @property
    def context(self) -> int:
        """Tokens a row."""
        return int(self.tokens.shape[1])

    def block_ids(self, step: int, batch_size: int) -> NDArray[np.int64]:
        """Which blocks batch number `step` (from 0) consists of, [batch_size]; epochs follow each other seamlessly.

        Raises:
            FlextronError: a negative step, or a batch without blocks.
        """
        if step < 0 or batch_size < 1:
            raise FlextronError(f"step must be at least 0 and batch_size at least 1, not {step} and {batch_size}")
        position, end = step * batch_size, (step + 1) * batch_size
        pieces = []
        while position < end:
            epoch, offset = divmod(position, self.num_blocks)
            pieces.append(_epoch_order(self.seed, epoch, self.num_blocks)[offset : offset + end - position])
            position += len(pieces[-1])
        return np.concatenate(pieces)

    def batch(self, step: int, batch_size: int) -> torch.Tensor:
        """Batch number `step`: int64 token ids, [batch_size, context].

        Raises:
            FlextronError: as `block_ids`.
        """
        rows = np.asarray(self.tokens)[self.block_ids(step, batch_size)]
        return torch.from_numpy(rows.astype(np.int64))

    def save(self, path: str | Path) -> None:
        """Write the tokens (not the seed) to a `.npy` file, all of it or nothing.

        Raises:
            FlextronError: the disk is full.
        """
        with new_file(Path(path)) as temporary, temporary.open("wb") as file:
            np.save(file, self.tokens, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path: str | Path, *, seed: int = 0) -> TokenBlocks:
        """Map a file that `save` wrote; rows are read from disk as they are used.

        Raises:
            FlextronError: no such file, or not token blocks.
        """
        try:
            tokens = np.lib.format.open_memmap(path, mode="r")  # np.load would take archives too
        except (OSError, EOFError, ValueError) as error:
            raise FlextronError(f"{path} holds no token blocks ({error}); write it with TokenBlocks.save") from error
        return cls(tokens=tokens, seed=seed)
