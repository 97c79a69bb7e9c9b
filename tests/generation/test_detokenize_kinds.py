"""Texts, streams and offsets of the tokenizers that published models have, against `transformers`' own decoding."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerBase

from flextron.generation.detokenize import Detokenizer, continuation
from tests.tokenizers_zoo import KINDS, SENTENCEPIECE, TEXTS, zoo_tokenizer

PROMPTS = ("", "The", "The ", "a fox.", "x\n", "[INST] dogs [/INST]", "café ", "🙂", "\N{REPLACEMENT CHARACTER}")


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def added(tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int]) -> str:
    """What decode(prompt + answer) adds to decode(prompt)."""
    before, whole = decode(tokenizer, prompt), decode(tokenizer, prompt + answer)
    assert whole.startswith(before)
    return whole[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_an_answer_is_what_it_adds(kind: str) -> None:
    tokenizer = zoo_tokenizer(kind)
    for prompt_text in PROMPTS:
        prompt = tokenizer(prompt_text).input_ids
        for text in TEXTS:
            for answer in (
                tokenizer.encode(text, add_special_tokens=False),
                [*tokenizer.encode(text, add_special_tokens=False)[1:], tokenizer.eos_token_id],
            ):
                assert continuation(tokenizer, prompt, answer) == added(tokenizer, prompt, answer)


@pytest.mark.parametrize("kind", KINDS)
def test_random_tokens_behind_random_prompts(kind: str) -> None:
    """Of SentencePiece's tokenizers without byte tokens: a run of them that is no UTF-8 breaks what is already out."""
    tokenizer, draw = zoo_tokenizer(kind), random.Random(kind)
    ids = [i for i in range(len(tokenizer)) if not str(tokenizer.convert_ids_to_tokens(i)).startswith("<0x")]
    for _ in range(300):
        prompt, answer = ([draw.choice(ids) for _ in range(draw.randrange(n))] for n in (8, 30))
        before, whole = decode(tokenizer, prompt), decode(tokenizer, prompt + answer)
        if whole.startswith(before):  # else the prompt ends in the middle of a character
            assert continuation(tokenizer, prompt, answer) == whole[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_of_a_stream_is_a_prefix_of_the_text(kind: str) -> None:
    tokenizer = zoo_tokenizer(kind)
    prompt = tokenizer("a fox").input_ids
    for text in TEXTS:
        answer, given = tokenizer.encode(text, add_special_tokens=False), ""
        stream, whole = Detokenizer(tokenizer, prompt), added(tokenizer, prompt, answer)
        for token in answer:
            given += stream.push(token)
            assert whole.startswith(given)
            assert "\N{REPLACEMENT CHARACTER}" not in given
        assert given + stream.finish() == whole


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_the_offsets_of_transformers(kind: str) -> None:
    """`offset_mapping` says where a token's characters lie in the text; those of a character in halves, at it."""
    tokenizer = zoo_tokenizer(kind)
    for text in TEXTS:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if decode(tokenizer, encoded.input_ids) != text:
            assert kind in SENTENCEPIECE  # the decoder takes a space of the text's own
            continue
        stream, found = Detokenizer(tokenizer), []
        for token in encoded.input_ids:
            found.append(stream.position)
            stream.push(token)
        assert found == [start for start, _ in encoded.offset_mapping]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_take_no_room(kind: str) -> None:
    tokenizer = zoo_tokenizer(kind)
    a, b = (tokenizer.encode(text, add_special_tokens=False)[-1] for text in ("fox", "dog"))
    stream = Detokenizer(tokenizer, [a])
    positions = []
    for token in (a, tokenizer.eos_token_id, b):
        positions.append(stream.position)
        stream.push(token)
    one = len(added(tokenizer, [a], [a]))
    assert positions == [0, one, one]


def test_a_replacement_character_that_is_meant_counts_at_once() -> None:
    tokenizer = zoo_tokenizer("mistral")
    tokenizer.add_tokens(["\N{REPLACEMENT CHARACTER}"])
    sign, word = len(tokenizer) - 1, tokenizer.encode("fox", add_special_tokens=False)[-1]
    stream, positions, pieces = Detokenizer(tokenizer, [word]), [], []
    for token in (sign, sign, word):
        positions.append(stream.position)
        pieces.append(stream.push(token))
    assert positions == [0, 1, 2]
    assert "".join(pieces).startswith("\N{REPLACEMENT CHARACTER}" * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_that_the_prompt_begins_is_the_prompts(kind: str) -> None:
    tokenizer = zoo_tokenizer(kind)
    tokens = tokenizer.encode("fox\N{OLD ITALIC LETTER A} fox", add_special_tokens=False)
    first = next(i for i in range(len(tokens)) if "\N{REPLACEMENT CHARACTER}" in decode(tokenizer, tokens[: i + 1]))
    for cut in (first + 1, first + 2):
        assert continuation(tokenizer, tokens[:cut], tokens[cut:]) == " fox"
