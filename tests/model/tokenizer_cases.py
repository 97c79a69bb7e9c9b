"""Tokenizers as the families have them, trained on a sentence: what they put before a text, and what ends it."""

from __future__ import annotations

import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["BEGINNINGS", "TOKENIZERS", "make_tokenizer"]

_TEXT = ["Once upon a time a small model learned to be smaller still, and the quick brown fox said: hello, hello."] * 3


def _byte_level(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(specials), special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


def _sentencepiece(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*specials, *bytes_], show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in _TEXT], trainer)
    # the trainer takes bytes as special tokens only; they are ordinary ones of the vocabulary
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in specials]
    return Tokenizer.from_str(json.dumps(data))


def _framed(tokenizer: Tokenizer, before: list[str], after: list[str]) -> Tokenizer:
    """Puts tokens before and behind every text."""
    named = [(name, tokenizer.token_to_id(name)) for name in {*before, *after}]
    frame = processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", "$B", *after], special_tokens=named
    )
    byte_level = processors.ByteLevel(trim_offsets=False)
    is_bytes = isinstance(tokenizer.decoder, decoders.ByteLevel)
    tokenizer.post_processor = processors.Sequence([byte_level, frame]) if is_bytes else frame
    return tokenizer


def _fast(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def _llama_2(after: list[str]) -> PreTrainedTokenizerFast:
    made = _framed(_sentencepiece(["<unk>", "<s>", "</s>"]), ["<s>"], after)
    return _fast(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _llama_3() -> PreTrainedTokenizerFast:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    made = _framed(_byte_level(specials), ["<|begin_of_text|>"], [])
    return _fast(made, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def _qwen() -> PreTrainedTokenizerFast:
    return _fast(_byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), eos_token="<|im_end|>")


def _gpt2() -> PreTrainedTokenizerFast:
    end = "<|endoftext|>"
    return _fast(_byte_level([end]), bos_token=end, eos_token=end, unk_token=end)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama-2": lambda: _llama_2([]),
    "llama-2-with-eos": lambda: _llama_2(["</s>"]),
    "llama-3": _llama_3,
    "qwen": _qwen,
    "gpt2": _gpt2,
}
BEGINNINGS = {"llama-2": ["<s>"], "llama-2-with-eos": ["<s>"], "llama-3": ["<|begin_of_text|>"], "qwen": [], "gpt2": []}
"""What each puts before a text, as its `tokenizer.json` has it."""


def make_tokenizer(case: str) -> PreTrainedTokenizerFast:
    """The case's tokenizer."""
    return TOKENIZERS[case]()
