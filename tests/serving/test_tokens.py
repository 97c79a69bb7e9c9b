"""Names of tokens beside log-probabilities, for the tokenizers that published models have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import flextron
from flextron import Engine, SamplingParams
from flextron.serving.tokens import TokenNames
from tests.server.running import running
from tests.tokenizers_zoo import KINDS, TEXTS, zoo_tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_tokens_have_one_name(kind: str) -> None:
    tokenizer = zoo_tokenizer(kind)
    names = TokenNames(tokenizer)
    keys = [names.key(token) for token in range(len(tokenizer) + 64)]
    assert len(set(keys)) == len(keys)
    assert "" not in keys


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_texts_make_up_the_text(kind: str) -> None:
    tokenizer = zoo_tokenizer(kind)
    names = TokenNames(tokenizer)
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        # SentencePiece's kind puts a space before every text; without `legacy`, only where there is none
        has_space = kind == "llama-2" or (kind == "mistral" and not text.startswith(" "))
        wanted = " " * has_space + text
        assert b"".join(map(names.raw, tokens)).decode() == wanted
        if all(ord(sign) < 128 for sign in text):
            assert "".join(map(names.text, tokens)) == wanted
            # NeoX has tokens of its own for runs of spaces that it has already
            assert all(names.key(t) in (names.text(t), "bytes:" + r"\x20" * len(names.text(t))) for t in tokens)


def test_spaces_at_the_beginning_count() -> None:
    names = TokenNames(tokenizer := zoo_tokenizer("llama-2"))
    with_space, without = (tokenizer.convert_tokens_to_ids(piece) for piece in ("\u2581the", "the"))
    assert names.key(with_space) == " the"
    assert names.raw(with_space) == b" the"
    assert without == tokenizer.unk_token_id or names.key(without) == "the"
    assert names.key(tokenizer.convert_tokens_to_ids("\u2581")) == " "


def test_byte_tokens_give_way_to_plain_ones() -> None:
    names = TokenNames(tokenizer := zoo_tokenizer("llama-2"))
    plain, spelt, other, tab = (tokenizer.convert_tokens_to_ids(p) for p in ("a", "<0x61>", "<0xE2>", "<0x09>"))
    assert [names.key(t) for t in (plain, spelt, other)] == ["a", "bytes:\\x61", "bytes:\\xe2"]
    assert [names.raw(t) for t in (plain, spelt, other)] == [b"a", b"a", b"\xe2"]
    assert names.key(tab) == "\t"


def test_ids_beyond_the_vocabulary_and_in_its_gaps() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 7}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.Fuse()
    names = TokenNames(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))
    assert [names.key(t) for t in (1, 7, 2, 8, 10**6)] == ["a", "b", "token_id:2", "token_id:8", "token_id:1000000"]
    assert names.raw(8) == b""


def saved_model(kind: str, directory: Path, padding: int) -> None:
    """A random Llama with one of the tokenizers, and rows of the embedding that no token has."""
    tokenizer = zoo_tokenizer(kind)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + padding,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config)
    # a run of bytes that is no UTF-8 would be decoded otherwise as a whole than piece by piece
    spelt = [i for piece, i in tokenizer.get_vocab().items() if piece.startswith("<0x")]
    model.lm_head.weight.data[spelt] = 0
    if padding:
        model.lm_head.weight.data[-padding:] *= 50
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize(("kind", "padding"), [("llama-2", 0), ("llama-2", 64), ("gpt2", 64)])
def test_the_server_names_and_places_what_the_model_says(kind: str, padding: int, tmp_path: Path) -> None:
    saved_model(kind, tmp_path, padding)
    model = flextron.convert(tmp_path, calibration=[TEXTS[0] * 20], num_calibration_tokens=128, context=32)
    assert model.tokenizer is not None
    engine, params = Engine(model, kv_cache_gb=0.005), SamplingParams(max_tokens=12, logprobs=5)
    prompt = "The quick"
    (wanted,) = engine.generate(prompt, params)
    assert model.generate(prompt, max_tokens=12) == wanted.text
    with running(model) as server:
        client = server.client()
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 5}
        whole = client.completions.create(**asked).choices[0]
        streamed = [c.choices[0] for c in client.completions.create(**asked, stream=True) if c.choices]
        names, tokenizer = server.service.names, server.service.tokenizer
    assert whole.text == wanted.text == "".join(c.text for c in streamed)
    assert whole.logprobs.tokens == [names.key(t) for t in wanted.token_ids]
    assert [len(top) for top in whole.logprobs.top_logprobs] == [5] * 12
    # decoding is that of the whole: where each token's text begins is what the ones before it make
    before = tokenizer.encode(prompt, add_special_tokens=False)
    ends = [tokenizer.decode([*before, *wanted.token_ids[:i]], skip_special_tokens=True) for i in range(12)]
    stable = [len(text.rstrip("\N{REPLACEMENT CHARACTER}")) - len(ends[0]) for text in ends]
    assert whole.logprobs.text_offset == stable
    for field in ("tokens", "text_offset", "token_logprobs"):
        assert [x for c in streamed if c.logprobs for x in getattr(c.logprobs, field)] == getattr(whole.logprobs, field)
