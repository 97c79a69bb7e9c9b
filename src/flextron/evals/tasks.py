"""Tasks of lm-eval whose rows come from local files: nothing is downloaded, and no cache is written.

Prompts, numbers of examples and metrics are those of lm-eval's own tasks of the same names. A folder of files may be
laid out in any way: a file is found by its name.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.hellaswag.utils import preprocess
from lm_eval.tasks.winogrande import preprocess_winogrande

from flextron.errors import FlextronError

__all__ = ["LOCAL_TASKS", "local_task"]

Row = dict[str, Any]
_SUFFIXES = (".jsonl.zst", ".jsonl")
_LETTERS = "ABCDEFGH"
_ACCURACIES = ("acc", "acc_norm")
_QUESTION = "Question: "


def _find(folder: Path, name: str) -> Path | None:
    """A file of that name, wherever it lies in the folder."""
    found = (path for suffix in _SUFFIXES for path in sorted(folder.rglob(name + suffix)))
    return next(found, None)


def _rows(path: Path, read: Callable[[Row], Row]) -> list[Row]:
    """What a file holds, in the form that prompts are made from.

    Raises:
        FlextronError: a line is no JSON object, or lacks a field.
    """
    rows: list[Row] = []
    try:
        with path.open("rb") as raw, _plain(raw, path) as lines:
            rows.extend(read(json.loads(line)) for line in lines if line.strip())
    except (ValueError, LookupError, TypeError, AttributeError, zstandard.ZstdError) as error:
        raise FlextronError(
            f"{path}, row {len(rows) + 1}, is not of this task ({error!r}); take the file as it was published"
        ) from error
    if not rows:
        raise FlextronError(f"{path} is empty; take the file as it was published")
    return rows


def _plain(raw: BinaryIO, path: Path) -> io.TextIOWrapper:
    is_packed = path.suffix == ".zst"
    return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw) if is_packed else raw, encoding="utf-8")


def _as_it_is(row: Row) -> Row:
    return row


def _arc(row: Row) -> Row:
    """The published fields, or a query with choices and the index of the right one."""
    if "query" in row:
        return {"question": row["query"].removeprefix(_QUESTION), "options": row["choices"], "gold": row["gold"]}
    choices = row["choices"]
    return {
        "question": row["question"],
        "options": choices["text"],
        "gold": choices["label"].index(row["answerKey"]),
    }


def _hellaswag(row: Row) -> Row:
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "query": preprocess(f"{row['activity_label']}: {context}"),
        "options": [preprocess(ending) for ending in row["endings"]],
        "gold": int(row["label"]),
    }


def _lambada(row: Row) -> Row:
    """A context and its last word; or the whole text, whose last word is cut off."""
    if "continuation" in row:
        return {"context": row["context"], "word": " " + row["continuation"]}
    context, _, word = row["text"].rpartition(" ")
    return {"context": context, "word": " " + word}


@dataclass(frozen=True, kw_only=True)
class LocalTask:
    """How a task is made from files."""

    files: Mapping[str, tuple[str, ...]]
    """File names of each split, without suffix; the first that exists counts."""
    read: Callable[[Row], Row]
    config: Mapping[str, Any]
    """Settings of lm-eval."""
    metrics: tuple[str, ...] = ("acc",)
    by_subject: bool = False
    """Whether each subject is a task of its own, of the same group."""


LOCAL_TASKS: Mapping[str, LocalTask] = {
    "arc_easy": LocalTask(
        files={"test": ("arc_easy", "ai2_arc_ARC-Easy_test", "ai2_arc_ARC-Easy_validation")},
        read=_arc,
        metrics=_ACCURACIES,
        config={
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "options",
            "doc_to_target": "gold",
        },
    ),
    "lambada_openai": LocalTask(
        files={"test": ("lambada_openai", "lambada_openai_test")},
        read=_lambada,
        metrics=("perplexity", "acc"),
        config={
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{word}}",
        },
    ),
    "piqa": LocalTask(
        files={"test": ("piqa_validation",)},
        read=_as_it_is,
        metrics=_ACCURACIES,
        config={
            "doc_to_text": "Question: {{goal}}\nAnswer:",
            "doc_to_choice": "{{[sol1, sol2]}}",
            "doc_to_target": "label",
        },
    ),
    "winogrande": LocalTask(
        files={"test": ("winogrande_winogrande_xl_validation", "winogrande_validation")},
        read=_as_it_is,
        config={
            "doc_to_text": preprocess_winogrande.doc_to_text,
            "doc_to_choice": preprocess_winogrande.doc_to_choice,
            "doc_to_target": preprocess_winogrande.doc_to_target,
        },
    ),
    "hellaswag": LocalTask(
        files={"test": ("hellaswag_validation",)},
        read=_hellaswag,
        metrics=_ACCURACIES,
        config={
            "num_fewshot": 10,
            # the published training split is rarely at hand; the question itself is never among its examples
            "fewshot_split": "test",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "options",
            "doc_to_target": "gold",
        },
    ),
    "mmlu": LocalTask(
        files={"dev": ("mmlu_dev",), "test": ("mmlu_test",)},
        read=_as_it_is,
        by_subject=True,
        config={
            "num_fewshot": 5,
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "doc_to_text": "{{question.strip()}}\n"
            + "".join(f"{letter}. {{{{choices[{i}]}}}}\n" for i, letter in enumerate(_LETTERS[:4]))
            + "Answer:",
            "doc_to_choice": list(_LETTERS[:4]),
            "doc_to_target": "answer",
        },
    ),
}
"""Tasks by the names that they have in lm-eval."""


def local_task(name: str, folder: Path) -> ConfigurableTask | Group:
    """A task of lm-eval, or a group of them, with its rows.

    Args:
        name: of one of `LOCAL_TASKS`.
        folder: that its files lie in, in folders of their own or not.

    Raises:
        FlextronError: the task is not among them, the folder lacks a file, or a file is damaged.
    """
    task = LOCAL_TASKS.get(name)
    if task is None:
        raise FlextronError(
            f"the task {name!r} is not made from files here; take {', '.join(LOCAL_TASKS)}, or leave --data out for "
            "lm-eval's own"
        )
    if not folder.is_dir():
        raise FlextronError(f"{folder} is no directory; name the one that holds the tasks' files")
    splits = {split: _rows(_needed(folder, names, name), task.read) for split, names in task.files.items()}
    if not task.by_subject:
        return ConfigurableTask(config=_config(name, task, splits))
    metrics = [{"metric": metric, "aggregation": "mean", "weight_by_size": True} for metric in task.metrics]
    group = Group.from_config({"group": name, "aggregate_metric_list": metrics})
    for subject in sorted({row["subject"] for row in splits["test"]}):
        own = {split: [row for row in rows if row["subject"] == subject] for split, rows in splits.items()}
        group.add(ConfigurableTask(config=_config(f"{name}_{subject}", task, own, subject)))
    return group


def _needed(folder: Path, names: tuple[str, ...], task: str) -> Path:
    path = next(filter(None, (_find(folder, name) for name in names)), None)
    if path is None:
        files = " or ".join(name + _SUFFIXES[0] for name in names)
        raise FlextronError(f"{folder} holds no {files}, which {task} needs; put it there, or leave the task out")
    return path


def _config(name: str, task: LocalTask, splits: Mapping[str, list[Row]], subject: str | None = None) -> dict[str, Any]:
    about = {}
    if subject is not None:
        spoken = subject.replace("_", " ")
        about["description"] = f"The following are multiple choice questions (with answers) about {spoken}.\n\n"
    return {
        "task": name,
        "custom_dataset": functools.partial(_datasets, splits),
        "output_type": "multiple_choice",
        "test_split": "test",
        "num_fewshot": 0,
        "metric_list": [
            {
                "metric": metric,
                "aggregation": "perplexity" if metric == "perplexity" else "mean",
                "higher_is_better": metric != "perplexity",
            }
            for metric in task.metrics
        ],
        **about,
        **task.config,
    }


def _datasets(splits: Mapping[str, list[Row]], **_: Any) -> dict[str, Dataset]:
    """What lm-eval asks for, with the task's metadata as arguments."""
    return {split: Dataset.from_list(rows) for split, rows in splits.items()}
