"""Prompts or lengths from a file: `.csv` with lengths, `.jsonl` with texts, each also compressed (`.zst`)."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from flextron.bench.lengths import Lengths, Sizes
from flextron.bench.traces import open_text
from flextron.errors import FlextronError

__all__ = ["Draft", "read_dataset"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a request will be made of."""

    sizes: Sizes
    """Lengths of prompt and output. The prompt's is in words if there is a text."""
    text: str | None = None
    """The prompt; made up of random words if None."""


def _lengths(path: Path, text: TextIO) -> list[Draft]:
    drafts = []
    rows = csv.DictReader(text)
    for row in rows:
        try:
            sizes = Sizes(prompt=int(row["prompt_tokens"]), output=int(row["output_tokens"]))
        except (KeyError, TypeError, ValueError):
            raise FlextronError(
                f"{path}, line {rows.line_num}: whole numbers are needed in columns prompt_tokens and output_tokens"
            ) from None
        drafts.append(Draft(sizes=sizes))
    return drafts


def _texts(path: Path, text: TextIO, output: Lengths, draws: random.Random) -> list[Draft]:
    drafts = []
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt = record["prompt"]
            wanted = int(record["output_tokens"]) if "output_tokens" in record else output.draw(draws)
            if not isinstance(prompt, str):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise FlextronError(
                f'{path}, line {number}: an object with a string "prompt" (and "output_tokens") is needed'
            ) from None
        drafts.append(Draft(sizes=Sizes(prompt=len(prompt.split()), output=wanted), text=prompt))
    return drafts


def read_dataset(path: Path, output: Lengths, draws: random.Random) -> list[Draft]:
    """All entries in the file's order; those without prompt or answer (0 tokens) are left out.

    Args:
        path: the file.
        output: lengths of answers, where a text says nothing about its own.
        draws: where they are drawn from.

    Raises:
        FlextronError: the file is missing, of another kind or empty, or a line of it is broken.
    """
    name = path.name.removesuffix(".zst")
    if not name.endswith((".csv", ".jsonl")):
        raise FlextronError(f"{path} must end in .csv or .jsonl, or one of these and .zst")
    with open_text(path) as text:
        drafts = _lengths(path, text) if name.endswith(".csv") else _texts(path, text, output, draws)
    drafts = [draft for draft in drafts if draft.sizes.prompt > 0 and draft.sizes.output > 0]
    if not drafts:
        raise FlextronError(f"{path} holds no prompts")
    return drafts
