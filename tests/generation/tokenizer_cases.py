"""What each kind of tokenizer puts before a text; one kind more than the zoo has also ends it."""

from __future__ import annotations

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.tokenizers_zoo import KINDS, zoo_tokenizer

__all__ = ["BEGINNINGS", "make_tokenizer"]

BEGINNINGS: dict[str, list[str]] = {kind: [] for kind in KINDS} | {
    "llama-2": ["<s>"],
    "llama-2-with-eos": ["<s>"],
    "mistral": ["<s>"],
    "llama-3": ["<|begin_of_text|>"],
}


def make_tokenizer(case: str) -> PreTrainedTokenizerFast:
    """The case's tokenizer."""
    if case != "llama-2-with-eos":
        return zoo_tokenizer(case)
    made = zoo_tokenizer("llama-2")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A $B </s>",
        special_tokens=[(name, made.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")],
    )
    return made
