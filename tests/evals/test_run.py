"""Tasks on sub-networks: figures that are lm-eval's own, the same examples for all, and the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from flextron import ElasticModel, api
from flextron.cli.main import main
from flextron.errors import FlextronError
from flextron.evals.model import FlextronLM
from flextron.evals.run import Measured, evaluate_tasks
from flextron.evals.tasks import LOCAL_TASKS, local_task
from tests.evals.local_files import write_files
from tests.tiny import make_tiny_llama
from tests.trained import trained_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_files(path)
    return path


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiled") / "elastic"
    trained_model().save(path)
    return path


def by_task(measured: Measured) -> dict[tuple[str, str], float]:
    return {(score.task, score.metric): score.value for score in measured.scores}


def test_all_tasks_are_those_of_hf(folder: Path, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "tiny")
    model = api.convert(
        tmp_path / "tiny", calibration=["Once upon a time. " * 200], num_calibration_tokens=512, context=64
    )
    hf = HFLM(pretrained=str(tmp_path / "tiny"), dtype="float32", batch_size=4, device="cpu")
    (own,) = evaluate_tasks(model, {"full": model.space.full}, list(LOCAL_TASKS), data=folder)
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(
        model=hf,
        tasks=[local_task(name, folder) for name in LOCAL_TASKS],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    expected = {
        (task, key.removesuffix(",none")): value
        for task, values in found["results"].items()
        for key, value in values.items()
        if key.endswith(",none") and "stderr" not in key
    }
    assert by_task(own) == pytest.approx(expected, rel=1e-4)
    assert {task for task, _ in expected} >= set(LOCAL_TASKS)


def test_an_object_for_simple_evaluate(folder: Path) -> None:
    model = trained_model()
    found = simple_evaluate(
        model=FlextronLM(model, latency=0.5),
        tasks=[local_task("piqa", folder)],
        task_manager=TaskManager(include_defaults=False),
        log_samples=False,
    )
    assert (
        found["results"]["piqa"]["acc,none"]
        == by_task(evaluate_tasks(model, {"half": model.select(latency=0.5)}, ["piqa"], data=folder)[0])["piqa", "acc"]
    )
    assert found["config"]["model"] == "FlextronLM"
    assert found["config"]["model_num_parameters"] == model.num_parameters(model.select(latency=0.5))


def test_groups_errors_and_counts(folder: Path) -> None:
    model = trained_model()
    (measured,) = evaluate_tasks(model, {"full": model.space.full}, ["mmlu", "hellaswag"], data=folder, limit=3)
    (whole,) = (score for score in measured.scores if score.task == "mmlu")
    parts = [score for score in measured.scores if score.in_group]
    assert (whole.in_group, whole.num_examples, whole.num_shots) == (False, 6, None)
    assert [(score.num_examples, score.num_shots) for score in parts] == [(3, 5), (3, 5)]
    assert whole.value == pytest.approx(sum(score.value for score in parts) / 2)
    assert whole.standard_error is not None
    assert {score.num_shots for score in measured.scores if score.task == "hellaswag"} == {10}


def test_the_draw_is_the_same_for_all_and_no_beginning(folder: Path) -> None:
    model = trained_model()
    seen: dict[str, list[tuple[int, int]]] = {}

    def on_network(name: str) -> Any:
        return lambda done, total: seen.setdefault(name, []).append((done, total))

    specs = {"a": model.space.full, "b": model.space.full}
    a, b = evaluate_tasks(model, specs, ["lambada_openai"], data=folder, limit=2, on_network=on_network)
    assert a.scores == b.scores
    assert {name: steps[-1] for name, steps in seen.items()} == {"a": (2, 2), "b": (2, 2)}
    others = [
        evaluate_tasks(model, {"a": model.space.full}, ["lambada_openai"], data=folder, limit=2, seed=seed)[0].scores
        for seed in range(1, 4)
    ]
    assert any(scores != a.scores for scores in others)


def test_prompts_as_messages(folder: Path) -> None:
    model = trained_model()
    assert model.tokenizer is not None
    model.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    plain, chat = (
        evaluate_tasks(model, {"a": model.space.full}, ["lambada_openai"], data=folder, chat_template=chat)[0].scores
        for chat in (False, True)
    )
    assert plain != chat


def test_what_cannot_run(folder: Path) -> None:
    model = trained_model()
    specs = {"full": model.space.full}
    with pytest.raises(FlextronError, match="no task to run"):
        evaluate_tasks(model, specs, [], data=folder)
    with pytest.raises(FlextronError, match="limit"):
        evaluate_tasks(model, specs, ["piqa"], data=folder, limit=0)


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["flextron", "eval", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_command_line(
    profiled: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    asked = (profiled, "--tasks", "piqa, lambada_openai", "--data", folder, "--limit", 4)
    assert command(monkeypatch, *asked, "--targets", "1.0,0.8,0.5") == 0
    out = capfd.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    header = next(line for line in out.splitlines() if "metric" in line)
    assert header.split() == ["task", "metric", "examples", "1", "0.8", "0.5"]
    assert sum(line.startswith("piqa") for line in out.splitlines()) == 2
    assert "±" in out
    model = api.load(profiled)
    count = model.num_parameters(model.select(latency=0.8))
    assert command(monkeypatch, *asked, "--params", count, "--json") == 0
    (result,) = json.loads(capfd.readouterr().out)
    assert result["parameters"] <= count
    assert result["subnet"] == model.select(params=count).to_dict()
    assert {score["task"] for score in result["scores"]} == {"piqa", "lambada_openai"}
    assert {"value", "standard_error", "examples", "shots"} < result["scores"][0].keys()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--tasks", "piqa", "--targets", "1.0", "--params", "5"), "take one of them"),
        (("--tasks", "piqa", "--targets", "fast"), "--targets takes values with commas"),
        (("--tasks", "piqa", "--targets", "2"), "latency is a fraction"),
        (("--tasks", "piqa", "--latency", "0.5"), "take --data and --targets"),
        (("--targets", "0.5"), "--targets goes with --tasks"),
        (("--tasks", "piqa,boolq"), "'boolq' is not made from files"),
        (("--tasks", ""), "'' is not made from files"),
    ],
)
def test_bad_input(
    profiled: Path,
    folder: Path,
    args: tuple[str, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = ("--data", folder) if "--tasks" in args else ()
    assert command(monkeypatch, profiled, *args, *data) == 2
    assert sentence in " ".join(capfd.readouterr().err.split())


def test_without_a_frontier(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "tiny", "--tasks", "piqa", "--targets", "0.5") == 2
    assert "flextron profile" in capfd.readouterr().err


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert command(monkeypatch, "tiny", "--tasks", "piqa") == 2
    assert "pip install 'flextron[eval]'" in " ".join(capfd.readouterr().err.split())


def test_on_a_loaded_model_only_names_matter(folder: Path) -> None:
    model: ElasticModel = trained_model()
    names = {"1": model.space.full, "small": model.space.smallest}
    assert [one.name for one in evaluate_tasks(model, names, ["piqa"], data=folder, limit=1)] == ["1", "small"]
