"""Tokenizers rebuilt from GGUF metadata, against the ones the metadata came from and against plain definitions."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.gguf.checkpoint import open_gguf
from flextron.gguf.tokenizer import tokenizer_from_metadata
from tests.gguf.writing import fields_of, to_gguf, write_gguf

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog isn't amused at all.",
    "In 2024 the 12 foxes met 345 dogs; they'd never seen such a café before!",
    "def fox(dogs):\n    return [dog for dog in dogs if dog.is_lazy]\n\n\n",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(pre_tokenizer: Any) -> tuple[Tokenizer, dict[str, Any]]:
    """A small byte-level BPE, and the metadata that a converter writes for it."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tokenizer, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(vocab) - len(SPECIAL)),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0,
    }


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
GPT2, GPT2_METADATA = trained(BYTES)
SMOLLM, SMOLLM_METADATA = trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]))


def rebuilt(metadata: dict[str, Any], **changes: Any) -> PreTrainedTokenizerBase:
    tokenizer = tokenizer_from_metadata(
        metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}, max_length=77
    )
    assert tokenizer is not None
    return tokenizer


REBUILT_GPT2 = rebuilt(GPT2_METADATA, pre="gpt-2")
REBUILT_SMOLLM = rebuilt(SMOLLM_METADATA, pre="smollm")


@given(text=st.text() | st.lists(st.sampled_from([*SPECIAL, *" ".join(CORPUS).split(), " ", "\n"])).map("".join))
def test_byte_level_tokens_are_the_originals_and_decode_to_the_text(text: str) -> None:
    for original, copy in ((GPT2, REBUILT_GPT2), (SMOLLM, REBUILT_SMOLLM)):
        ids = copy(text).input_ids
        assert ids == original.encode(text).ids
        assert copy.decode(ids) == text


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("gpt-2", "I|'m|Ġ2024|-|ready|,|Ġ|ĠYOU|'|RE|ĊĊĠ|Ġhot|!"),
        ("smollm", "I|'m|Ġ|2|0|2|4|-|ready|,|Ġ|ĠYOU|'|RE|ĊĊĠ|Ġhot|!"),
        ("llama-bpe", "I|'m|Ġ|202|4|-ready|,|Ġ|ĠYOU|'RE|ĊĊ|Ġ|Ġhot|!"),
        ("qwen2", "I|'m|Ġ|2|0|2|4|-ready|,|Ġ|ĠYOU|'RE|ĊĊ|Ġ|Ġhot|!"),
    ],
)
def test_each_rule_splits_as_published(rule: str, pieces: str) -> None:
    """The pieces are worked out by hand from the regular expressions in the models' own `tokenizer.json`."""
    splitter = rebuilt(GPT2_METADATA, pre=rule).backend_tokenizer.pre_tokenizer
    found = [piece for piece, _ in splitter.pre_tokenize_str("I'm 2024-ready,  YOU'RE\n\n  hot!")]
    assert found == pieces.split("|")


@pytest.mark.parametrize(("rule", "is_composed"), [("qwen2", True), ("olmo", True), ("gpt-2", False)])
def test_accents_are_composed_where_the_original_does(rule: str, is_composed: bool) -> None:
    tokenizer = rebuilt(GPT2_METADATA, pre=rule)
    assert (tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids) is is_composed


def test_llama3_takes_words_that_are_tokens_whole() -> None:
    tokens = [*GPT2_METADATA["tokenizer.ggml.tokens"], "zzxq"]
    types = [*GPT2_METADATA["tokenizer.ggml.token_type"], 1]
    for rule, is_whole in (("llama-bpe", True), ("qwen2", False)):
        tokenizer = rebuilt(GPT2_METADATA, pre=rule, tokens=tokens, token_type=types)
        ids = tokenizer("zzxq", add_special_tokens=False).input_ids
        assert (ids == [len(tokens) - 1]) is is_whole


def test_special_and_added_tokens_stay_whole() -> None:
    tokens = [*GPT2_METADATA["tokenizer.ggml.tokens"], "<think>", "   "]
    types = [*GPT2_METADATA["tokenizer.ggml.token_type"], 4, 4]
    tokenizer = rebuilt(GPT2_METADATA, tokens=tokens, token_type=types)
    assert len(tokenizer) == len(tokens)
    ids = tokenizer("<|im_start|><think>   ").input_ids
    assert ids == [1, len(tokens) - 2, len(tokens) - 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>   "
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|endoftext|>", "<|endoftext|>")


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_bos_and_eos_are_added_where_the_file_says_so(begins: bool, ends: bool) -> None:
    tokenizer = rebuilt(GPT2_METADATA, add_bos_token=begins, add_eos_token=ends)
    plain = GPT2.encode("a fox").ids
    framed = [1] * begins + plain + [2] * ends
    assert tokenizer("a fox").input_ids == framed
    assert tokenizer("a fox", "a fox").input_ids == framed * 2
    assert tokenizer("a fox", add_special_tokens=False).input_ids == plain


def test_old_llama3_files_that_say_nothing_begin_with_bos() -> None:
    assert rebuilt(GPT2_METADATA, pre="llama-bpe")("fox").input_ids[0] == 1
    assert rebuilt(GPT2_METADATA, pre="qwen2")("fox").input_ids[0] != 1


def test_chat_template_and_length() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer = rebuilt(GPT2_METADATA | {"tokenizer.chat_template": template})
    assert tokenizer.apply_chat_template([{"role": "user", "content": "fox"}], tokenize=False) == (
        "<|im_start|>fox<|im_end|>"
    )
    assert tokenizer.model_max_length == 77


def sentencepiece(**changes: Any) -> tuple[PreTrainedTokenizerBase, dict[str, float]]:
    """A tokenizer of SentencePiece's kind over a random half of the parts of the corpus's words, and their scores."""
    words = {"\u2581" + word for word in " ".join(CORPUS).split() if "é" not in word}
    pieces = sorted({word[i:j] for word in words for j in range(1, len(word) + 1) for i in range(j)})
    draw = random.Random(0)
    pieces = [piece for piece in pieces if len(piece) == 1 or draw.random() < 0.5]
    draw.shuffle(pieces)
    scores = {piece: -float(i) for i, piece in enumerate(pieces)}
    special, raw = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *raw, *sorted(scores)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(scores)],
        "tokenizer.ggml.scores": [0.0] * 259 + [scores[piece] for piece in sorted(scores)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return rebuilt(metadata, **changes), scores


def merge_greedily(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE by its definition: join the neighbours whose union scores best until none is a token."""
    symbols = list(text)
    while True:
        unions = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not unions:
            return symbols
        i = -max(unions)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def test_sentencepiece_merges_by_score_and_begins_with_bos() -> None:
    tokenizer, scores = sentencepiece()
    for text in ("The quick dog jumps over 345 foxes", "they'd  never seen lazy dogs", " isn't"):
        ids = tokenizer(text).input_ids
        assert ids[0] == 1
        assert tokenizer.convert_ids_to_tokens(ids[1:]) == merge_greedily(
            "\u2581" + text.replace(" ", "\u2581"), scores
        )
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_falls_back_to_bytes_and_can_do_without_the_prefix() -> None:
    tokenizer, _ = sentencepiece(add_space_prefix=False, add_bos_token=False)
    ids = tokenizer("fé").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["f", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "fé"
    assert tokenizer.decode(tokenizer(" fox").input_ids) == " fox"


def test_no_tokenizer_and_unknown_kinds() -> None:
    assert tokenizer_from_metadata({}, max_length=8) is None
    assert tokenizer_from_metadata({"tokenizer.ggml.model": "no_vocab"}, max_length=8) is None
    with pytest.raises(FlextronError, match=r"'martian'.*gpt-2, olmo, smollm, llama-bpe.*Hugging Face"):
        rebuilt(GPT2_METADATA, pre="martian")
    with pytest.raises(FlextronError, match=r"'bert'.*gpt2, llama.*Hugging Face"):
        rebuilt(GPT2_METADATA, model="bert")


def test_the_tokenizer_comes_with_the_file(tmp_path: Path) -> None:
    size = len(SMOLLM_METADATA["tokenizer.ggml.tokens"])
    config = GPT2Config(vocab_size=size, n_embd=32, n_layer=1, n_head=4, n_positions=48)
    tensors = {name: tensor.detach() for name, tensor in GPT2LMHeadModel(config).named_parameters()}
    fields = fields_of(config) | SMOLLM_METADATA | {"tokenizer.ggml.pre": "smollm"}
    tokenizer = open_gguf(write_gguf(tmp_path / "model.gguf", "gpt2", fields, to_gguf(tensors, config))).tokenizer
    assert tokenizer is not None
    assert tokenizer(CORPUS[1]).input_ids == SMOLLM.encode(CORPUS[1]).ids
    assert len(tokenizer("2024").input_ids) == 4
    assert tokenizer.model_max_length == 48
