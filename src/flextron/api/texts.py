"""Sources of texts for the Python API, and how texts become sequences of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.generation.encoding import beginning
from flextron.texts.blocks import pack_tokens
from flextron.texts.documents import read_documents
from flextron.texts.machine_text import drop_overlaps, pydoc_topics, python_docstrings

__all__ = [
    "Texts",
    "check_prompt",
    "check_sequences",
    "documents",
    "evaluation_text",
    "needed",
    "sequences",
    "source_name",
    "training_text",
]

Texts = Iterable[str] | str | Path | None
"""Documents; or the name of a file, directory or `datasets` id; or None for text that is on this machine."""

_MACHINE_CHARS = 4_000_000


def evaluation_text() -> list[str]:
    """English prose on every machine with Python, never trained on by default: the language reference's topics."""
    return pydoc_topics()


def training_text(max_chars: int = _MACHINE_CHARS) -> list[str]:
    """Docstrings of the installed Python code, without any passage of `evaluation_text`."""
    return drop_overlaps(python_docstrings(max_chars=max_chars), evaluation_text())


def documents(text: Texts, default: Callable[[], list[str]]) -> Iterable[str]:
    """Texts as given, those of a file or data set if it is a name, or the default.

    Raises:
        FlextronError: they are of another type; while iterating if one of them is no string.
    """
    if text is None:
        return default()
    if isinstance(text, (str, os.PathLike)):
        return read_documents(os.fspath(text))
    if isinstance(text, (bytes, bytearray, Mapping)) or not isinstance(text, Iterable):
        raise FlextronError(f"texts are strings, or the name of a file, directory or data set, not {_kind(text)}")
    return _strings(text)


def _strings(texts: Iterable[object]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise FlextronError(f"texts are strings, but text {number} is {_kind(text)}; pass texts alone")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, which no tokenizer takes
            raise FlextronError(f"text {number} is not valid Unicode ({error.reason}); mend or drop it") from error
        yield text


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def check_prompt(prompt: object) -> None:
    """Refuse what is no text.

    Raises:
        FlextronError: says what it is instead.
    """
    if not isinstance(prompt, str):
        raise FlextronError(f"a prompt is a string, not {_kind(prompt)}; flextron.Engine takes lists of token ids, too")


def check_sequences(num_tokens: int, context: int) -> None:
    """Refuse sequences in which nothing is predicted, and fewer tokens than one sequence has.

    Raises:
        FlextronError: names the number that does not fit.
    """
    if context < 2:
        raise FlextronError(f"context must be at least 2 tokens, not {context}: the first is only read")
    if num_tokens < context:
        raise FlextronError(f"num_tokens must be at least {context}, the tokens of one sequence, not {num_tokens}")


def sequences(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    num_tokens: int,
    context: int,
    vocab_size: int | None = None,
) -> Tensor:
    """Packed sequences of token ids, int64, (B, context).

    Each begins as the tokenizer begins a text, in the place of the tokens that would stand there (as llama.cpp's
    perplexity does): models that were trained with BOS predict badly where a sequence starts in the midst of a text.

    Raises:
        FlextronError: as for `check_sequences` and `pack_tokens`.
    """
    check_sequences(num_tokens, context)
    tokens = pack_tokens(documents, needed(tokenizer), num_tokens=num_tokens, context=context, vocab_size=vocab_size)
    tokens_BT = torch.from_numpy(tokens.reshape(-1, context).astype("int64"))
    begin = beginning(needed(tokenizer))[:context]
    tokens_BT[:, : len(begin)] = torch.tensor(begin, dtype=torch.int64)
    return tokens_BT


def needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer, or a clear error.

    Raises:
        FlextronError: there is none.
    """
    if tokenizer is None:
        raise FlextronError("the checkpoint has no tokenizer; put the original's tokenizer.json beside its config.json")
    return tokenizer


def source_name(text: Texts, default: str) -> str:
    """What to call a text in a record."""
    if text is None:
        return default
    return os.fspath(text) if isinstance(text, (str, os.PathLike)) else "documents"
