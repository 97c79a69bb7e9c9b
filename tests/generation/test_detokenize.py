"""Text in pieces against the text as a whole, for streams of tokens that no model would write."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flextron.errors import FlextronError
from flextron.generation.detokenize import Detokenizer, StopStrings
from flextron.workflows.tiny import tiny_model

BYTE_LEVEL = AutoTokenizer.from_pretrained(tiny_model())


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: words begin with a sign for a space, other characters are spelt in bytes."""
    pieces = [f"<0x{i:02X}>" for i in range(256)] + ["▁", "▁a", "b", "▁the", ".", "é"]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


BYTE_FALLBACK = byte_fallback()


def pieces_of(tokenizer: Any, tokens: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer)
    return [*(stream.push(token) for token in tokens), stream.finish()]


def whole(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@settings(max_examples=300)
@given(st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=60))
def test_pieces_make_up_the_whole(tokens: list[int]) -> None:
    assert "".join(pieces_of(BYTE_LEVEL, tokens)) == whole(BYTE_LEVEL, tokens)


@settings(max_examples=100)
@given(st.lists(st.sampled_from([*BYTE_LEVEL.encode("🙂é€"), 0]), max_size=40))
def test_bytes_in_any_order_make_up_the_whole(tokens: list[int]) -> None:
    assert "".join(pieces_of(BYTE_LEVEL, tokens)) == whole(BYTE_LEVEL, tokens)


@settings(max_examples=200)
@given(st.text())
def test_no_character_is_split(text: str) -> None:
    assume("\N{REPLACEMENT CHARACTER}" not in text)
    pieces = pieces_of(BYTE_LEVEL, BYTE_LEVEL.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


CHUNKS = [BYTE_FALLBACK.encode(c, add_special_tokens=False)[1:] for c in "🙂€é.b"] + [[258], [259], [261], [0], [1]]


@settings(max_examples=200)
@given(st.lists(st.sampled_from(CHUNKS), max_size=30))
def test_spaces_and_bytes_of_a_sentencepiece_tokenizer(chunks: list[list[int]]) -> None:
    tokens = [token for chunk in chunks for token in chunk]
    pieces = pieces_of(BYTE_FALLBACK, tokens)
    assert "".join(pieces) == whole(BYTE_FALLBACK, tokens)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(st.lists(st.integers(0, len(BYTE_FALLBACK) - 1), max_size=30))
def test_broken_bytes_of_a_sentencepiece_tokenizer_lose_no_other_text(tokens: list[int]) -> None:
    found = "".join(pieces_of(BYTE_FALLBACK, tokens))
    for letter in ("the", "b", "."):
        pieces = [BYTE_FALLBACK.convert_ids_to_tokens(t) for t in tokens]
        asked = sum(letter in p and not p.startswith("<") for p in pieces)
        assert found.count(letter) >= asked


@pytest.mark.parametrize("token", [BYTE_LEVEL.encode("€")[1], BYTE_LEVEL.encode("é")[0], 300])
def test_work_is_linear_in_the_length(token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    stream = Detokenizer(BYTE_LEVEL)
    decode = BYTE_LEVEL.decode
    monkeypatch.setattr(
        type(BYTE_LEVEL), "decode", lambda self, ids, **options: asked.append(len(ids)) or decode(ids, **options)
    )
    for _ in range(500):
        stream.push(token)
    assert sum(asked) < 500 * 60


def cut_at_first_stop(text: str, stop: list[str]) -> str:
    """By definition: read on until the text ends with a stop string, and drop the longest such."""
    for end in range(len(text) + 1):
        met = [s for s in stop if text[:end].endswith(s)]
        if met:
            return text[: end - max(map(len, met))]
    return text


@settings(max_examples=500)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_a_stop_string_ends_the_text(pieces: list[str], stop: list[str]) -> None:
    stops = StopStrings(stop)
    given_out, so_far = [], ""
    wanted = cut_at_first_stop("".join(pieces), stop)
    for piece in pieces:
        given_out.append(stops.push(piece))
        so_far += piece
        assert (stops.found is not None) == any(s in so_far for s in stop)
        if stops.found is not None:
            assert stops.found in stop
            assert so_far.startswith(wanted + stops.found)
        # nothing is given out that may have to be taken back, and nothing is held that need not be
        assert wanted.startswith("".join(given_out))
        if not stops.found:
            held = so_far[len("".join(given_out)) :]
            assert held == "" or any(s.startswith(held) for s in stop)
    assert "".join(given_out) + stops.finish() == wanted


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(FlextronError, match="stop string is empty"):
        StopStrings(["a", ""])
