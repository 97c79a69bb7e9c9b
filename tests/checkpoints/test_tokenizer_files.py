"""Written tokenizers: the same tokens again, and no name or key that transformers 4 does not know.

`tests/test_oldest_transformers.py` reads them with the oldest version itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from flextron.checkpoints.tokenizer_files import write_tokenizer
from tests.tokenizers_zoo import KINDS, TEXTS, zoo_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_tokenizer_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = zoo_tokenizer(kind)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|extra|>"]})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    write_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "two<|extra|>parts"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.decode(again.convert_tokens_to_ids(["<|extra|>"]), skip_special_tokens=True) == ""
    assert again.chat_template == tokenizer.chat_template
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(written.get("extra_special_tokens"), list)
    assert not {"is_local", "local_files_only"} & written.keys()


def test_a_tokenizer_of_a_class_of_its_own_keeps_its_pipeline(tmp_path: Path) -> None:
    plain = zoo_tokenizer("gpt2")
    vocab = plain.get_vocab()
    merges = [tuple(m) for m in json.loads(plain.backend_tokenizer.to_str())["model"]["merges"]]
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges, add_prefix_space=True)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    write_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again(TEXTS[0])["input_ids"] != plain(TEXTS[0])["input_ids"]
