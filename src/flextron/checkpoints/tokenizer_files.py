"""Tokenizers written so that transformers 4 and 5 read them alike.

`transformers` 5 has class names that 4 does not know (`TokenizersBackend`), and lists of special tokens where 4 wants
another key. A tokenizer of the `tokenizers` library is whole in its `tokenizer.json`; the class that takes it as it is
has one name in both, `PreTrainedTokenizerFast`.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flextron.files import read_json, write_json

__all__ = ["write_tokenizer"]

_CONFIG = "tokenizer_config.json"
_NOT_SETTINGS = ("is_local", "local_files_only")
"""What `transformers` 5 notes of how the tokenizer was loaded."""


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer into an existing directory."""
    tokenizer.save_pretrained(directory)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    config = read_json(directory / _CONFIG)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        config["additional_special_tokens"] = extra
    elif extra:
        config["extra_special_tokens"] = extra
    for name in _NOT_SETTINGS:
        config.pop(name, None)
    write_json(directory / _CONFIG, config)
