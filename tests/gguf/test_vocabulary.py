"""What GGUF files say of tokens: tokenizers of all kinds against their originals, and lists that are damaged or odd.

What is refused, ignored or assumed is what llama.cpp's loader does with the same keys.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.gguf.tokenizer import tokenizer_from_metadata
from flextron.gguf.vocabulary import end_ids, read_vocabulary, special_ids
from tests.tokenizers_zoo import KINDS, TEXTS, gguf_metadata, zoo_tokenizer

P = "tokenizer.ggml."


def built(kind: str, **changes: Any) -> PreTrainedTokenizerBase:
    """From the kind's metadata with some keys changed; None takes a key out."""
    metadata = gguf_metadata(kind) | {P + key: value for key, value in changes.items()}
    tokenizer = tokenizer_from_metadata({k: v for k, v in metadata.items() if v is not None}, max_length=64)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_texts_are_the_originals(kind: str, tmp_path: Path) -> None:
    original = zoo_tokenizer(kind)
    built(kind).save_pretrained(tmp_path)
    for copy in (built(kind), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(copy) == len(original)
        assert copy.all_special_ids == original.all_special_ids
        for text in TEXTS:
            ids = original(text).input_ids
            if kind != "mistral" or not text.startswith(" "):  # files cannot say that only bare words get a space
                assert copy(text).input_ids == ids
            for skip in (False, True):
                assert copy.decode(ids, skip_special_tokens=skip) == original.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "mistral"])
def test_special_tokens_within_a_text(kind: str) -> None:
    original, copy = zoo_tokenizer(kind), built(kind)
    text = f"fox{original.eos_token}dogs {original.eos_token}\n{original.eos_token}"
    assert copy(text).input_ids == original(text).input_ids


@pytest.mark.parametrize("kind", ["llama-3", "gpt2"])
@pytest.mark.parametrize("merges", [None, [], "a b", np.zeros(3)])
def test_merges_must_be_there(kind: str, merges: object) -> None:
    with pytest.raises(FlextronError, match=r"no merges.*convert"):
        built(kind, merges=merges)


@pytest.mark.parametrize("merge", ["a b c", "ab", "qqqq zzzz", "", " ", "a  b", "a qqqq"])
def test_merges_join_two_tokens_to_a_third(merge: str) -> None:
    merges = gguf_metadata("gpt2")[P + "merges"]
    with pytest.raises(FlextronError, match=r"the merge .* does not join two of its tokens"):
        built("gpt2", merges=[*merges[:5], merge, *merges[5:]])


@pytest.mark.parametrize("kind", ["llama-2", "gpt2"])
def test_tokens_that_occur_twice_or_are_no_texts_are_refused(kind: str) -> None:
    tokens = gguf_metadata(kind)[P + "tokens"]
    with pytest.raises(FlextronError, match="twice"):
        built(kind, tokens=[*tokens[:-1], tokens[40]])
    for bad in ("text", np.arange(4), [1, 2], []):
        with pytest.raises(FlextronError, match="no list of texts"):
            built(kind, tokens=bad)


def test_empty_tokens_get_a_name_as_in_llama_cpp() -> None:
    metadata = gguf_metadata("llama-2")
    tokens = [*metadata[P + "tokens"], "", ""]
    scores, types = [*metadata[P + "scores"], 0.0, 0.0], [*metadata[P + "token_type"], 1, 1]
    tokenizer = built("llama-2", tokens=tokens, scores=scores, token_type=types)
    size = len(tokens)
    assert tokenizer.convert_ids_to_tokens([size - 2, size - 1]) == [f"[EMPTY_{size - 2}]", f"[EMPTY_{size - 1}]"]


@pytest.mark.parametrize("kind", ["llama-2", "gpt2"])
def test_type_lists_that_are_short_or_no_numbers_are_refused(kind: str) -> None:
    for types in ([1] * 5, "text", ["a"] * 1000, 7, np.ones((1000, 2))):
        with pytest.raises(FlextronError, match="token_type is not one number for each"):
            built(kind, token_type=types)
    assert built(kind, token_type=[*gguf_metadata(kind)[P + "token_type"], 1, 1])  # longer ones are allowed


def test_scores_that_are_short_or_no_numbers_are_refused() -> None:
    size = len(gguf_metadata("llama-2")[P + "tokens"])
    nan, infinite = [0.0] * size, [0.0] * size
    nan[7], infinite[9] = float("nan"), float("inf")
    for scores in ([0.0] * 10, nan, infinite, "text", ["a"] * size, 7.0):
        with pytest.raises(FlextronError, match="scores are not one number for each"):
            built("llama-2", scores=scores)


@pytest.mark.parametrize("scores", [None, -1000.0, 3])
def test_equal_or_missing_scores_mean_the_order_of_ids(scores: float | None) -> None:
    """The converter writes -1000 for every token where it has a `tokenizer.json` alone."""
    metadata = gguf_metadata("llama-2")
    size = len(metadata[P + "tokens"])
    ordered = sorted(range(size), key=lambda i: -metadata[P + "scores"][i])
    tokens = [metadata[P + "tokens"][i] for i in ordered]
    types = [metadata[P + "token_type"][i] for i in ordered]
    ids = {f"{name}_token_id": tokens.index(t) for name, t in {"bos": "<s>", "eos": "</s>", "unknown": "<unk>"}.items()}
    copy = built("llama-2", tokens=tokens, token_type=types, scores=scores and [scores] * size, **ids)
    original = zoo_tokenizer("llama-2")
    for text in TEXTS:
        found = copy.convert_ids_to_tokens(copy(text).input_ids)
        assert found == original.convert_ids_to_tokens(original(text).input_ids)


def test_an_endless_token_is_refused() -> None:
    metadata = gguf_metadata("llama-2")
    tokens = [*metadata[P + "tokens"], "a" * 100_000]
    scores, types = [*metadata[P + "scores"], 0.0], [*metadata[P + "token_type"], 1]
    with pytest.raises(FlextronError, match="more than 4096 characters"):
        built("llama-2", tokens=tokens, scores=scores, token_type=types)


@pytest.mark.parametrize("bad", [2**32 - 1, -1, 10**6, 2**63, "7", 3.0, True, [1]])
@pytest.mark.parametrize("name", ["padding", "eos", "unknown", "bos"])
def test_special_ids_that_do_not_exist_are_ignored_with_a_warning(
    name: str, bad: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "flextron.model"):
        tokenizer = built("gpt2", **{f"{name}_token_id": bad})
    assert f"{P}{name}_token_id" in caplog.text
    assert getattr(tokenizer, {"padding": "pad", "unknown": "unk"}.get(name, name) + "_token_id") is None
    assert tokenizer(TEXTS[0]).input_ids == zoo_tokenizer("gpt2")(TEXTS[0]).input_ids


@pytest.mark.parametrize("bad", [None, 2**32 - 1])
def test_sentencepiece_has_its_usual_special_ids(bad: int | None) -> None:
    tokenizer = built("llama-2", bos_token_id=bad, eos_token_id=bad, unknown_token_id=bad)
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token) == ("<unk>", "<s>", "</s>")
    assert tokenizer(TEXTS[0]).input_ids == zoo_tokenizer("llama-2")(TEXTS[0]).input_ids


def test_a_bos_that_is_added_and_not_named_is_refused() -> None:
    with pytest.raises(FlextronError, match=r"adds its bos_token.*add_bos_token"):
        built("qwen2", add_bos_token=True)
    with pytest.raises(FlextronError, match=r"adds its eos_token.*add_eos_token"):
        built("qwen2", add_eos_token=True, eos_token_id=2**32 - 1)
    with pytest.raises(FlextronError, match="true or false"):
        built("qwen2", add_bos_token="yes")


def test_ends_of_turns_end_an_answer() -> None:
    """Llama 3's first files named <|end_of_text|> alone; llama.cpp knows <|eot_id|> by its name."""
    metadata = gguf_metadata("llama-3")
    index = metadata[P + "tokens"].index
    text, turn = index("<|end_of_text|>"), index("<|eot_id|>")
    assert end_ids(metadata, len(metadata[P + "tokens"]), text) == [text, turn]
    plain = {k: v for k, v in metadata.items() if k != P + "tokens"}
    assert end_ids(plain | {P + "eot_token_id": 7, P + "eom_token_id": 9}, 20, 3) == [3, 7, 9]
    assert end_ids(plain | {P + "eot_token_id": 99}, 20, 3) == [3]
    assert special_ids(plain | {P + "eos_token_id": 5}, 20)["eos_token"] == 5


def test_ends_of_turns_are_control_tokens_whatever_their_type() -> None:
    metadata = gguf_metadata("qwen2")
    types = [1] * len(metadata[P + "tokens"])
    vocabulary = read_vocabulary(metadata | {P + "token_type": types})
    assert vocabulary is not None
    assert [t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == 3] == [
        "<|endoftext|>",
        "<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("arch", "kind"), [("gpt2", "gpt2"), ("gptneox", "neox"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_an_architecture_with_one_rule_needs_not_name_it(arch: str, kind: str) -> None:
    metadata = {k: v for k, v in gguf_metadata(kind).items() if k != P + "pre"} | {"general.architecture": arch}
    copy, original = tokenizer_from_metadata(metadata, max_length=8), zoo_tokenizer(kind)
    assert copy is not None
    for text in TEXTS:
        assert copy(text).input_ids == original(text).input_ids


def test_a_llama_that_names_no_rule_is_refused() -> None:
    with pytest.raises(FlextronError, match=r"does not say by which rule.*llama-bpe"):
        built("llama-3", pre=None)
    for bad in (7, ["gpt-2"], ""):
        with pytest.raises(FlextronError, match="unknown rule"):
            built("llama-3", pre=bad)


def test_keys_that_a_byte_level_tokenizer_cannot_follow_are_refused() -> None:
    with pytest.raises(FlextronError, match="add_space_prefix"):
        built("gpt2", add_space_prefix=True)
    assert built("gpt2", add_space_prefix=False)


def test_named_chat_templates_are_kept() -> None:
    key = "tokenizer.chat_template"
    metadata = gguf_metadata("qwen2") | {key: "default text", f"{key}.tool_use": "with tools"}
    tokenizer = tokenizer_from_metadata(metadata, max_length=8)
    assert tokenizer is not None
    assert tokenizer.chat_template == {"default": "default text", "tool_use": "with tools"}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "default text"
    with pytest.raises(FlextronError, match="chat template that is no text"):
        tokenizer_from_metadata(metadata | {key: 7}, max_length=8)
