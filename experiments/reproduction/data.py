"""Text to tokens: a byte-level BPE of the training text, and packed training, search and validation tokens.

Documents are dealt out whole, so no validation document is trained on, neither by the tokenizer nor by a model. Search
tokens are a part of the held-out documents of their own: sub-networks are chosen on them and reported on validation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flextron.errors import FlextronError
from flextron.files import new_directory, read_json, write_json
from flextron.texts.blocks import TokenBlocks, pack_tokens
from flextron.texts.documents import read_documents

__all__ = ["Data", "load_data", "prepare", "split_of", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
_HELD_OUT = 32
"""One document in so many is held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What every run of the experiment reads."""

    tokenizer: PreTrainedTokenizerFast
    train: TokenBlocks
    search_BT: Tensor
    """Windows on which sub-networks are chosen."""
    validation_BT: Tensor
    """Windows on which everything is compared."""
    digest: str
    """Of all tokens."""


def split_of(document: str) -> str:
    """`train`, `search` or `validation`: a function of the document alone, so that equal ones stay together."""
    bucket = int.from_bytes(hashlib.sha256(document.strip().encode()).digest()[:4], "big") % (2 * _HELD_OUT)
    return {0: "search", 1: "validation"}.get(bucket, "train")


def train_tokenizer(documents: Iterable[str], vocab_size: int, num_chars: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt on the first `num_chars` characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_chars(documents, num_chars), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _first_chars(documents: Iterable[str], num_chars: int) -> Iterator[str]:
    for document in documents:
        if num_chars <= 0:
            return
        yield document[:num_chars]
        num_chars -= len(document)


def _documents(source: str, split: str) -> Iterator[str]:
    empty = True
    for document in read_documents(source):
        if split_of(document) == split:
            empty = False
            yield document
    if empty:
        raise FlextronError(f"no document of {source} falls to {split}; give a text of some hundred documents or more")


def prepare(
    directory: Path,
    source: str,
    *,
    vocab_size: int,
    num_train_tokens: int,
    num_search_tokens: int,
    num_validation_tokens: int,
    context: int,
) -> Data:
    """Read, tokenize and pack a source, or read what an earlier call left in the directory.

    Args:
        directory: kept between calls; made in one move.
        source: file, directory, glob or `datasets` id.
        vocab_size: of the tokenizer.
        num_train_tokens: wanted; if the text holds fewer, training goes over it again.
        num_search_tokens: for choosing sub-networks.
        num_validation_tokens: for comparing.
        context: tokens of a window.

    Raises:
        FlextronError: the text is too short, or the directory holds other data.
    """
    wanted = {
        "source": source,
        "vocab_size": vocab_size,
        "tokens": {"train": num_train_tokens, "search": num_search_tokens, "validation": num_validation_tokens},
        "context": context,
    }
    if not directory.exists():
        tokenizer = train_tokenizer(_documents(source, "train"), vocab_size, num_chars=4 * num_train_tokens)
        with new_directory(directory) as temporary:
            for split, num_tokens in wanted["tokens"].items():
                tokens = pack_tokens(_documents(source, split), tokenizer, num_tokens=num_tokens, context=context)
                TokenBlocks.from_tokens(tokens, context=context).save(temporary / f"{split}.npy")
            tokenizer.save_pretrained(temporary / "tokenizer")
            write_json(temporary / "data.json", wanted)
    if read_json(directory / "data.json") != wanted:
        raise FlextronError(f"{directory} holds tokens of another text or size; choose another output directory")
    return load_data(directory)


def load_data(directory: Path) -> Data:
    """Read what `prepare` made.

    Raises:
        FlextronError: there is nothing.
    """
    splits = {name: TokenBlocks.load(directory / f"{name}.npy") for name in ("train", "search", "validation")}
    digest = hashlib.sha256()
    for blocks in splits.values():
        digest.update(blocks.tokens.tobytes())
    return Data(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer"),
        train=splits["train"],
        search_BT=torch.from_numpy(splits["search"].tokens.astype("int64")),
        validation_BT=torch.from_numpy(splits["validation"].tokens.astype("int64")),
        digest=digest.hexdigest()[:16],
    )
