"""Tokenizers written to GGUF: the keys of llama.cpp's converter, and the same tokens when they are read back."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flextron.errors import FlextronError
from flextron.export.gguf.tokenizer import tokenizer_metadata
from flextron.gguf.rules import rule_of
from flextron.gguf.tokenizer import tokenizer_from_metadata
from tests.tokenizers_zoo import KINDS, SENTENCEPIECE, TEXTS, gguf_metadata, zoo_tokenizer

RULES = ("default", "gpt-2", "olmo", "smollm", "llama-bpe", "qwen2")


def written(tokenizer: PreTrainedTokenizerFast, arch: str = "llama", extra: int = 0, **options: Any) -> dict[str, Any]:
    ends = options.pop("ends", ())
    return tokenizer_metadata(tokenizer, vocab_size=len(tokenizer) + extra, ends=ends, arch=arch)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_those_that_llama_cpp_writes(kind: str) -> None:
    found = written(zoo_tokenizer(kind))
    expected = gguf_metadata(kind)
    scores = expected.pop("tokenizer.ggml.scores", None)
    assert {key: found[key] for key in expected} == expected
    if scores is not None:
        ranked = [s for s in scores if s < 0 and s > -1e6]
        assert sorted(s for s in found["tokenizer.ggml.scores"] if s < 0) == sorted(ranked)[-len(ranked) :]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_come_back(kind: str) -> None:
    tokenizer = zoo_tokenizer(kind)
    keys = {"general.architecture": "llama"} | written(tokenizer)
    again = tokenizer_from_metadata(keys, max_length=64)
    assert again is not None
    for text in TEXTS:
        if kind == "mistral" and text.startswith(" "):
            continue  # Mistral's tokenizer puts no space before a space, and GGUF has no key for that
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert again.decode(ids) == tokenizer.decode(ids)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(again, name) for name in names] == [getattr(tokenizer, name) for name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_said_whether_texts_begin_with_bos(kind: str) -> None:
    found = written(zoo_tokenizer(kind))
    assert found[gguf.Keys.Tokenizer.ADD_BOS] is (kind in (*SENTENCEPIECE, "llama-3"))
    assert found[gguf.Keys.Tokenizer.ADD_EOS] is False


@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_recognised_and_no_other(name: str) -> None:
    rule = rule_of(name, None)
    tokenizer = zoo_tokenizer("gpt2")
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = rule.split()
    backend.normalizer = normalizers.NFC() if rule.is_composed else None  # type: ignore[assignment]
    backend.model.ignore_merges = rule.takes_words
    assert written(tokenizer)[gguf.Keys.Tokenizer.PRE] == name


def test_a_rule_without_a_name_is_refused() -> None:
    tokenizer = zoo_tokenizer("gpt2")
    split = pre_tokenizers.Split(Regex(r"\d{2}|\D+"), behavior="isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])  # type: ignore[assignment]
    with pytest.raises(FlextronError, match="splits text by a rule that has no name"):
        written(tokenizer)


def test_a_tokenizer_that_would_read_otherwise_is_refused() -> None:
    tokenizer = zoo_tokenizer("llama-2")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Lowercase(), normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    with pytest.raises(FlextronError, match="cannot be expressed in GGUF"):
        written(tokenizer)


def test_rows_of_the_embedding_without_a_token_are_unused() -> None:
    tokenizer = zoo_tokenizer("qwen2")
    found = written(tokenizer, extra=3)
    size = len(tokenizer)
    assert found["tokenizer.ggml.tokens"][size:] == [f"[PAD{i}]" for i in range(size, size + 3)]
    assert found["tokenizer.ggml.token_type"][size:] == [int(gguf.TokenType.UNUSED)] * 3
    with pytest.raises(FlextronError, match="do not belong together"):
        tokenizer_metadata(tokenizer, vocab_size=size - 1, ends=(), arch="qwen2")


def test_all_ends_of_an_answer_and_all_templates_go_along() -> None:
    tokenizer = zoo_tokenizer("llama-3")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    end_of_text = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    found = written(tokenizer, ends=(tokenizer.eos_token_id, end_of_text))
    assert found[gguf.Keys.Tokenizer.EOS_ID] == tokenizer.eos_token_id
    assert found[gguf.Keys.Tokenizer.EOT_ID] == end_of_text
    assert found[gguf.Keys.Tokenizer.CHAT_TEMPLATE] == tokenizer.chat_template


def test_a_model_without_a_tokenizer_is_a_file_of_ids() -> None:
    assert tokenizer_metadata(None, vocab_size=5, ends=(), arch="llama") == {"tokenizer.ggml.model": "no_vocab"}
