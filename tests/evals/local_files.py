"""Rows of each task in the published forms, as files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import zstandard

__all__ = ["SUBJECTS", "write_files"]

SUBJECTS = ("abstract_algebra", "world_religions")
_WORDS = ["once", "upon", "a", "time", "small", "model", "learned", "to", "be", "smaller", "still"]


def _some(draw: random.Random, most: int = 5) -> str:
    return " ".join(draw.choices(_WORDS, k=draw.randint(1, most)))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(zstandard.compress(text) if path.suffix == ".zst" else text)


def write_files(folder: Path, count: int = 6) -> None:
    """Write some rows of every task into two folders, packed and not."""
    draw = random.Random(0)
    one, two = folder / "eval-one", folder / "eval-two"

    def options(number: int) -> list[str]:
        return [_some(draw) for _ in range(number)]

    _write(
        one / "arc_easy.jsonl.zst",
        [
            {"query": f"Question: {_some(draw)}?", "choices": options(4), "gold": draw.randrange(4)}
            for _ in range(count)
        ],
    )
    _write(
        one / "lambada_openai.jsonl.zst",
        [{"context": _some(draw, 30), "continuation": draw.choice(_WORDS)} for _ in range(count)],
    )
    _write(
        two / "piqa_validation.jsonl",
        [
            {"goal": _some(draw), "sol1": _some(draw), "sol2": _some(draw), "label": draw.randrange(2)}
            for _ in range(count)
        ],
    )
    _write(
        two / "winogrande_winogrande_xl_validation.jsonl.zst",
        [
            {"sentence": f"{_some(draw)} _ {_some(draw)}", "option1": "model", "option2": "time", "answer": answer}
            for answer in draw.choices("12", k=count)
        ],
    )
    _write(
        two / "hellaswag_validation.jsonl.zst",
        [
            {
                "activity_label": "Learning",
                "ctx_a": "A model learned.",
                "ctx_b": "once",
                "endings": [f"{_some(draw)} [step]" for _ in range(4)],
                "label": str(draw.randrange(4)),
            }
            for _ in range(max(count, 12))
        ],
    )
    for split in ("dev", "test"):
        _write(
            two / f"mmlu_{split}.jsonl.zst",
            [
                {"question": f" {_some(draw)} ", "subject": subject, "choices": options(4), "answer": draw.randrange(4)}
                for subject in SUBJECTS
                for _ in range(6)
            ],
        )
