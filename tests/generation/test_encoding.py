"""Texts to tokens, against `tokenizer(text)`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flextron.generation.encoding import beginning, encode
from tests.generation.tokenizer_cases import BEGINNINGS, make_tokenizer


@pytest.mark.parametrize("case", BEGINNINGS)
@pytest.mark.parametrize("text", ["Once upon a time", " hello", "", "é 中\n\n", "<s>hello</s>"])
def test_a_text_is_encoded_as_the_tokenizer_does(case: str, text: str, tmp_path: Path) -> None:
    made = make_tokenizer(case)
    made.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(made, text) == stock(text)["input_ids"]
    assert encode(made, text, add_special_tokens=False) == stock(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("case", BEGINNINGS)
def test_what_stands_before_every_text(case: str) -> None:
    tokenizer = make_tokenizer(case)
    begin = beginning(tokenizer)
    assert tokenizer.convert_ids_to_tokens(begin) == BEGINNINGS[case]
    assert (len(begin) > 0) == (case.startswith(("llama", "mistral")))
    whole = tokenizer("hello")["input_ids"]
    assert whole[: len(begin)] == begin


def test_a_vocabulary_without_letters_has_a_beginning_too() -> None:
    model = Tokenizer(models.BPE({"<s>": 0, "0": 1, "</s>": 2}, []))
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    assert tokenizer("a")["input_ids"] == [0, 2]
    assert beginning(tokenizer) == [0]
