"""The training text: prose, textbooks, conversations and code, interleaved in fixed shares.

`python -m experiments.elastification.mix --data DIR --output mix.jsonl` writes one record a line, with its source. Long
documents are cut at paragraphs, so that any stretch of the file is a mixture. The last records of each source are never
written: `heldout` returns them.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from flextron.api.texts import needed
from flextron.checkpoints.huggingface import open_pretrained
from flextron.workflows.demo import default_model

__all__ = ["SOURCES", "Source", "heldout", "lines", "main"]

_CHARS = 6000
"""Longest piece of a document."""
_HELD_OUT = 100
"""Conversations that are kept for evaluation."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one kind of text comes from."""

    share: float
    """Of the characters written."""
    licence: str
    read: Callable[[Path, PreTrainedTokenizerBase], Iterator[str]]


def lines(path: Path) -> list[Any]:
    """Records of a compressed file of JSON lines."""
    with pa.input_stream(str(path), compression="zstd") as stream:
        return [json.loads(line) for line in stream.read().decode().split("\n") if line]


def _pieces(text: str) -> Iterator[str]:
    """A document in pieces of whole paragraphs."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > _CHARS:
            yield piece
            piece = ""
        piece += ("\n\n" if piece else "") + paragraph
    if piece.strip():
        yield piece


def _prose(pattern: str) -> Callable[[Path, PreTrainedTokenizerBase], Iterator[str]]:
    def read(data: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
        for path in sorted(data.glob(pattern)):
            for record in lines(path):
                yield from _pieces(record["text"])

    return read


def _instruction(prompt: str) -> str:
    """What was asked, without the frame that some data sets put around it."""
    return prompt.partition("### Instruction:\n")[2].partition("\n\n### Response:")[0].strip() or prompt.strip()


def _conversations(data: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    kept = _dolly(data)[:-_HELD_OUT]
    maths = [(r["question"], r["answer"]) for r in lines(data / "instruct/gsm8k_train.jsonl.zst")]
    rng = random.Random(0)
    while maths:  # conversations of the smaller set come round again
        rng.shuffle(kept)
        for asked, answered in kept:
            yield _chat(tokenizer, asked, answered)
            if maths:
                yield _chat(tokenizer, *maths.pop())


def _dolly(data: Path) -> list[tuple[str, str]]:
    """Questions and answers, shuffled; the last ones are held out."""
    records = lines(data / "instruct/dolly_hhrlhf_train_small.jsonl.zst")
    pairs = [(_instruction(r["prompt"]), r["response"]) for r in records]
    random.Random(0).shuffle(pairs)
    return pairs


def _chat(tokenizer: PreTrainedTokenizerBase, asked: str, answered: str) -> str:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered.strip()}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def heldout(data: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Conversations that `main` never writes."""
    return [_chat(tokenizer, *pair) for pair in _dolly(data)[-_HELD_OUT:]]


def _code(data: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The standard library: each file, and its docstrings as prose."""
    left_out = {"site-packages", "test", "tests", "lib2to3", "idlelib", "pydoc_data"}
    paths = sorted(p for p in Path(sysconfig.get_path("stdlib")).rglob("*.py") if not left_out & set(p.parts))
    random.Random(0).shuffle(paths)
    for path in paths:
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        docs = "\n\n".join(d for n in nodes if (d := ast.get_docstring(n)) and len(d) > 100)
        yield from _pieces(source)
        yield from _pieces(docs)


SOURCES = {
    "wikipedia": Source(share=0.40, licence="CC BY-SA", read=_prose("enwiki-2018-slice/*.zst")),
    "books": Source(share=0.20, licence="public domain", read=_prose("classic-books/*.zst")),
    "textbooks": Source(share=0.15, licence="CC BY", read=_prose("openstax-ccby/*.zst")),
    "conversations": Source(share=0.12, licence="CC BY-SA (Dolly), MIT (HH-RLHF, GSM8K)", read=_conversations),
    "code": Source(share=0.13, licence="PSF", read=_code),
}


def mixed(data: Path, tokenizer: PreTrainedTokenizerBase, num_chars: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(Source, text) of documents, each time from the source that is the furthest behind its share."""
    pools = {
        name: list(_first(source.read(data, tokenizer), source.share * num_chars)) for name, source in SOURCES.items()
    }
    rng = random.Random(seed)
    for pool in pools.values():
        rng.shuffle(pool)
    taken = dict.fromkeys(SOURCES, 0.0)
    at = dict.fromkeys(SOURCES, 0)
    while sum(taken.values()) < num_chars:
        name = min(SOURCES, key=lambda n: taken[n] / SOURCES[n].share)
        text = pools[name][at[name] % len(pools[name])]  # a small source comes round again
        at[name] += 1
        taken[name] += len(text)
        yield name, text


def _first(texts: Iterator[str], num_chars: float) -> Iterator[str]:
    for text in texts:
        if num_chars <= 0:
            return
        num_chars -= len(text)
        yield text


def main() -> None:
    """Write the mixture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the sources")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines to write")
    parser.add_argument("--chars", type=float, default=80e6, help="characters in all")
    args = parser.parse_args()
    tokenizer = needed(open_pretrained(default_model()).tokenizer)
    with args.output.open("w", encoding="utf-8") as file:
        for name, text in mixed(args.data, tokenizer, int(args.chars)):
            file.write(json.dumps({"text": text, "source": name}) + "\n")


if __name__ == "__main__":
    main()
