"""Tasks from files: the prompts of lm-eval's own tasks, and clear words about files that are missing or damaged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from flextron.errors import FlextronError
from flextron.evals.tasks import LOCAL_TASKS, local_task
from tests.evals.local_files import SUBJECTS, write_files

OWN = Path(lm_eval.tasks.__file__).parent
"""Where lm-eval's configurations lie."""
YAML = {
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "mmlu": "mmlu/default/mmlu_abstract_algebra.yaml",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_files(path)
    return path


def loaded(name: str, folder: Path) -> Any:
    return TaskManager(include_defaults=False).load([local_task(name, folder)])


def published(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row as the hub has it, from the form in the files here."""
    if name == "arc_easy":
        letters = ["A", "B", "C", "D"]
        return {
            "question": row["question"],
            "choices": {"text": row["options"], "label": letters},
            "answerKey": letters[row["gold"]],
        }
    if name == "lambada_openai":
        return {"text": row["context"] + row["word"]}
    if name == "hellaswag":
        return {"query": row["query"], "choices": row["options"], "label": str(row["gold"])}
    return row


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_prompts_choices_and_metrics_are_lm_evals(name: str, folder: Path) -> None:
    tasks = loaded(name, folder)["tasks"]
    task = next(iter(tasks.values()))
    theirs: Any = object.__new__(ConfigurableTask)
    config = load_yaml(OWN / YAML[name], resolve_func=True)
    theirs._config = type(task.config)(
        **{key: value for key, value in config.items() if key not in ("tag", "group", "include")}
    )
    theirs.prompt, theirs.multiple_input = None, task.multiple_input
    assert theirs.config.output_type == task.OUTPUT_TYPE
    assert [m["metric"] for m in task.config.metric_list] == [m["metric"] for m in theirs.config.metric_list]
    assert (task.config.description or "") == (theirs.config.description or "")
    for row in task.eval_docs:
        theirs.features = list(published(name, row))
        for part in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            if getattr(task.config, part) is not None:
                own, other = getattr(task, part)(row), getattr(theirs, part)(published(name, row))
                assert str(own) == str(other)


def test_shots_are_the_fields(folder: Path) -> None:
    shots = {name: {t.config.num_fewshot for t in loaded(name, folder)["tasks"].values()} for name in LOCAL_TASKS}
    assert shots == {name: {{"hellaswag": 10, "mmlu": 5}.get(name, 0)} for name in LOCAL_TASKS}


def test_no_question_is_its_own_example(folder: Path) -> None:
    (task,) = loaded("hellaswag", folder)["tasks"].values()
    task.set_fewshot_seed(0)
    for row in task.eval_docs:
        prompt = task.fewshot_context(row, 10)
        assert prompt.count("\n\n") == 10
        own = row["options"][row["gold"]]
        assert (
            f"{row['query']} {own}\n\n" not in prompt
            or sum(r["options"][r["gold"]] == own and r["query"] == row["query"] for r in task.eval_docs) > 1
        )


def test_hellaswag_is_cleaned(folder: Path) -> None:
    (task,) = loaded("hellaswag", folder)["tasks"].values()
    row = task.eval_docs[0]
    assert row["query"] == "Learning: A model learned. Once"
    assert not any("[" in option for option in row["options"])


def test_subjects_are_tasks_of_a_group(folder: Path) -> None:
    found = loaded("mmlu", folder)
    assert list(found["groups"]) == ["mmlu"]
    assert list(found["tasks"]) == [f"mmlu_{subject}" for subject in SUBJECTS]
    for task in found["tasks"].values():
        subject = {row["subject"] for row in task.eval_docs}
        assert len(subject) == 1
        assert {row["subject"] for row in task.fewshot_docs()} == subject


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FlextronError, match="no directory"):
        local_task("piqa", tmp_path / "nowhere")
    with pytest.raises(FlextronError, match=re.escape("piqa_validation.jsonl")):
        local_task("piqa", tmp_path)
    with pytest.raises(FlextronError, match="'gsm8k' is not made from files"):
        local_task("gsm8k", tmp_path)
    path = tmp_path / "arc_easy.jsonl"
    for text, match in (
        ('{"query": "a", "choices": ["b"], "gold": 0}\n{"query": "a"}\n', "row 2"),
        ("[1, 2]\n", "row 1"),
        ("{", "row 1"),
        ("\n", "empty"),
    ):
        path.write_text(text)
        with pytest.raises(FlextronError, match=match):
            local_task("arc_easy", tmp_path)
    path.rename(tmp_path / "arc_easy.jsonl.zst")
    with pytest.raises(FlextronError, match="row 1"):
        local_task("arc_easy", tmp_path)


def test_both_forms_of_arc_and_lambada(tmp_path: Path) -> None:
    (tmp_path / "ai2_arc_ARC-Easy_validation.jsonl").write_text(
        '{"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}\n'
    )
    (tmp_path / "lambada_openai_test.jsonl").write_text('{"text": "once upon a time"}\n')
    (arc,) = loaded("arc_easy", tmp_path)["tasks"].values()
    assert arc.eval_docs[0] == {"question": "Why?", "options": ["a", "b"], "gold": 1}
    (lambada,) = loaded("lambada_openai", tmp_path)["tasks"].values()
    assert lambada.eval_docs[0] == {"context": "once upon a", "word": " time"}
