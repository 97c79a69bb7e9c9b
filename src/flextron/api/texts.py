"""Where the Python face's texts come from, and how they become windows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.training.blocks import pack_tokens
from flextron.training.documents import read_documents
from flextron.training.machine_text import drop_overlaps, pydoc_topics, python_docstrings

__all__ = ["Texts", "documents", "evaluation_text", "needed", "source_name", "training_text", "windows"]

Texts = Iterable[str] | str | None
"""Documents; or the name of a file, directory or `datasets` id; or None for text that is on this machine."""

_MACHINE_CHARS = 4_000_000


def evaluation_text() -> list[str]:
    """English prose on every machine with Python, never trained on by default: the language reference's topics."""
    return pydoc_topics()


def training_text(max_chars: int = _MACHINE_CHARS) -> list[str]:
    """Docstrings of the installed Python code, without any passage of `evaluation_text`."""
    return drop_overlaps(python_docstrings(max_chars=max_chars), evaluation_text())


def documents(text: Texts, default: Callable[[], list[str]]) -> Iterable[str]:
    """Texts as given, those of a file or data set if it is a name, or the default."""
    if text is None:
        return default()
    return read_documents(text) if isinstance(text, str) else text


def windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    num_tokens: int,
    context: int,
    vocab_size: int | None = None,
) -> Tensor:
    """Packed windows of token ids, int64, (B, context); see `pack_tokens`."""
    tokens = pack_tokens(documents, needed(tokenizer), num_tokens=num_tokens, context=context, vocab_size=vocab_size)
    return torch.from_numpy(tokens.reshape(-1, context).astype("int64"))


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
    return text if isinstance(text, str) else "documents" if text is not None else default
