"""What a checkpoint says about generating, against what `transformers` reads from the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from flextron.errors import FlextronError
from flextron.generation.constraints import Grammars
from flextron.generation.defaults import GenerationDefaults, generation_defaults, read_generation_config
from flextron.generation.generate import SamplingParams
from tests.generation.tokenizer_cases import make_tokenizer


def read(directory: Path, content: str) -> dict[str, Any] | None:
    (directory / "generation_config.json").write_text(content)
    return read_generation_config(directory)


@pytest.mark.parametrize("named", [7, [7, 9], [9], [], None])
def test_all_ends_end_an_answer(named: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("llama-3")
    found = read(tmp_path, json.dumps({"eos_token_id": named, "bos_token_id": 0}))
    stock = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    of_stock = {stock} if isinstance(stock, int) else set(stock or ())
    for configured in (8, [8, 11], None):
        ends = set(generation_defaults(found, {"eos_token_id": configured}, tokenizer).ends)
        others = {8} if configured == 8 else set(configured or ())
        assert ends == of_stock | others | {tokenizer.eos_token_id}
    assert generation_defaults(None, {}, None).ends == ()


@pytest.mark.parametrize("named", [-1, [7, -1], 2**40, [10, 7], [10]])
def test_ends_that_are_no_tokens_are_left_out(named: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Transformers compares ids with them, and none is ever equal."""
    given = named if isinstance(named, list) else [named]
    for found in (
        generation_defaults({"eos_token_id": named}, {"vocab_size": 10}, None),
        generation_defaults(None, {"eos_token_id": named, "vocab_size": 10}, None),
    ):
        assert found.ends == tuple(token for token in given if token in range(10))
    assert "do not exist" in caplog.text
    tokenizer = make_tokenizer("llama-3")
    ends = generation_defaults({"eos_token_id": named}, {"vocab_size": len(tokenizer)}, tokenizer).ends
    Grammars(tokenizer, len(tokenizer), ends)


def test_a_checkpoint_without_the_file_has_none(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) is None
    (tmp_path / "generation_config.json").mkdir()
    assert read_generation_config(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"eos_token_id": "</s>"}', "bad eos_token_id"),
        ('{"eos_token_id": [1, null]}', "bad eos_token_id"),
        ('{"eos_token_id": true}', "bad eos_token_id"),
        ('{"eos_token_id": 1.5}', "bad eos_token_id"),
        ('{"temperature": -1}', "bad temperature"),
        ('{"temperature": NaN}', "bad temperature"),
        ('{"temperature": "hot"}', "bad temperature"),
        ('{"top_p": 1.5}', "bad top_p"),
        ('{"do_sample": 3}', "bad do_sample"),
        ('{"max_new_tokens": 0}', "bad max_new_tokens"),
    ],
)
def test_a_malformed_file_is_named_in_one_sentence(content: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(FlextronError, match=said) as refused:
        read(tmp_path, content)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path}/generation_config.json ")


@pytest.mark.parametrize(
    ("settings", "temperature", "top_p"),
    [
        ({}, 0.0, 1.0),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, 0.6, 0.9),
        ({"temperature": 0.6}, 0.6, 1.0),
        ({"do_sample": True}, 1.0, 1.0),
        ({"do_sample": False, "top_p": None}, 0.0, 1.0),
        ({"temperature": 0.6, "top_p": 0}, 0.0, 1.0),
        ({"temperature": 0}, 0.0, 1.0),
    ],
)
def test_defaults_of_those_who_say_nothing(settings: dict[str, Any], temperature: float, top_p: float) -> None:
    found = generation_defaults(settings, {}, None).sampling()
    assert found == SamplingParams(temperature=temperature, top_p=top_p)


def test_the_makers_way_to_draw_is_the_default() -> None:
    settings = {"temperature": 0.6, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    assert generation_defaults(settings, {}, None).sampling() == SamplingParams(**settings)
    assert generation_defaults({"top_k": -1}, {}, None).sampling() == SamplingParams()


def test_the_length_is_a_limit() -> None:
    assert generation_defaults({"max_new_tokens": 5}, {}, None).sampling().max_tokens == 5
    assert generation_defaults({"max_new_tokens": 5000}, {}, None).sampling() == SamplingParams()


def test_what_is_not_applied_is_told() -> None:
    asked = {
        "typical_p": 0.9,
        "no_repeat_ngram_size": 2,
        "temperature": 0.7,
        "top_k": 20,
        "bad_words_ids": [[1] * 90],
        "pad_token_id": 0,
    }
    said = generation_defaults(asked, {}, None).complaint
    assert said is not None
    assert "typical_p 0.9, no_repeat_ngram_size 2, bad_words_ids [[1, 1" in said
    assert "temperature" not in said
    assert "top_k" not in said
    assert len(said) < 250


@pytest.mark.parametrize(
    "neutral",
    [{}, {"top_k": 0}, {"repetition_penalty": 1.0, "min_p": 0.0, "num_beams": 1, "typical_p": 1.0}, {"top_k": None}],
)
def test_what_changes_nothing_is_not_told(neutral: dict[str, Any]) -> None:
    assert generation_defaults(neutral, {}, None).complaint is None
    assert GenerationDefaults().complaint is None
