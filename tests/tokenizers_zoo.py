"""Tiny tokenizers of the kinds that published models have, and what a GGUF file says of each.

The components are those of the models' own `tokenizer.json`; vocabularies are trained on a few lines, on the spot.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

__all__ = ["KINDS", "SENTENCEPIECE", "TEXTS", "gguf_metadata", "zoo_tokenizer"]

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog isn't amused at all.",
    "In 2024 the 12 foxes met 345 dogs; they'd never SEEN such a café before!",
    "def fox(dogs):\n    return [dog for dog in dogs if dog.is_lazy]\n\n\n",
    " leading and trailing spaces  ",
    "emoji 🙂🙃 and 中文, naïve Ωmega — ok",
)
SENTENCEPIECE = ("llama-2", "mistral")
KINDS = (*SENTENCEPIECE, "llama-3", "qwen2", "qwen3", "gpt2", "neox")
_SPACE = "\u2581"
_BYTES = [f"<0x{i:02X}>" for i in range(256)]
_WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}DIGITS",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_SPECIAL = {
    "llama-3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gpt2": ["<|endoftext|>"],
    "neox": ["<|endoftext|>", "<|padding|>"],
}
_OWN = {"qwen3": ["<tool_call>", "</tool_call>", "<think>", "</think>"], "neox": ["    ", "  "]}
"""Added tokens that are text."""
_SENTENCEPIECE = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_NAMES = {
    "llama-2": _SENTENCEPIECE,
    "mistral": _SENTENCEPIECE,
    "llama-3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "gpt2": _GPT2,
    "neox": _GPT2,
}
_PRE = {"llama-3": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2", "gpt2": "gpt-2", "neox": "olmo"}


@cache
def _trained(kind: str) -> Tokenizer:
    return _sentencepiece(kind) if kind in SENTENCEPIECE else _byte_level(kind)


def zoo_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of that kind, in a copy of one's own."""
    copy = Tokenizer.from_str(_trained(kind).to_str())
    return PreTrainedTokenizerFast(tokenizer_object=copy, clean_up_tokenization_spaces=False, **_NAMES[kind])


def _parts(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    data = json.loads(tokenizer.to_str())["model"]
    return data["vocab"], [tuple(merge) for merge in data["merges"]]


def _sentencepiece(kind: str) -> Tokenizer:
    """BPE over characters, words beginning with a sign for a space, other characters spelt in bytes."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    head = ["<unk>", "<s>", "</s>", *(["[INST]", "[/INST]"] if kind == "mistral" else []), *_BYTES]
    # some letters have no token, and the last text's signs neither
    learner.train_from_iterator(
        list(TEXTS[:3]), trainers.BpeTrainer(vocab_size=520, special_tokens=head, show_progress=False)
    )
    vocab, merges = _parts(learner)
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in head if t not in _BYTES])
    _begin_with(tokenizer, "<s>")
    return tokenizer


def _byte_level(kind: str) -> Tokenizer:
    digits = {"llama-3": "{1,3}", "qwen2": "", "qwen3": ""}
    tokenizer = Tokenizer(BPE(ignore_merges=kind == "llama-3"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in digits:
        split = pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", digits[kind])), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    if kind in ("qwen2", "qwen3", "neox"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(list(TEXTS), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIAL[kind]])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in _OWN.get(kind, [])])
    if kind == "llama-3":
        _begin_with(tokenizer, "<|begin_of_text|>")
    return tokenizer


def _begin_with(tokenizer: Tokenizer, bos: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def gguf_metadata(kind: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of the tokenizer."""
    tokenizer, trained = zoo_tokenizer(kind), _trained(kind)
    vocab, merges = _parts(trained)
    tokens = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    special = set(tokenizer.all_special_tokens) | set(_SPECIAL.get(kind, ["[INST]", "[/INST]"]))
    types = [3 if t in special else 4 if t in _OWN.get(kind, []) else 6 if t in _BYTES else 1 for t in tokens]
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {keys[name]: tokenizer.convert_tokens_to_ids(token) for name, token in _NAMES[kind].items()}
    out = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
    out |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if kind not in SENTENCEPIECE:
        return out | {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _PRE[kind],
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }
    types[0] = 2
    rank = {left + right: -float(i) for i, (left, right) in enumerate(merges)}
    scores = [rank.get(token, 0.0 if token not in vocab else -1e6) for token in tokens]
    return out | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
