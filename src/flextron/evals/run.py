"""Tasks run on several sub-networks of one model, and what comes out."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.api.task
import numpy as np
import torch
from lm_eval import evaluate as run_tasks
from lm_eval.tasks import TaskManager

from flextron.api import ElasticModel
from flextron.errors import FlextronError
from flextron.evals.model import FlextronLM
from flextron.evals.tasks import local_task
from flextron.spec import SubnetSpec

__all__ = ["Measured", "TaskScore", "evaluate_tasks"]

_FEWSHOT_SEED = 1234
"""lm-eval's own."""
_BOOTSTRAP_ROUNDS = 200
"""For standard errors of metrics that are no means, such as perplexity; they are within some percent then."""

OnNetwork = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """One metric of a task or of a group of tasks."""

    task: str
    metric: str
    """With the name of lm-eval's filter behind it, where there is one."""
    value: float
    standard_error: float | None
    """None where lm-eval has none."""
    num_examples: int
    """Scored ones."""
    num_shots: int | None
    """Worked examples before each; None for a group."""
    in_group: bool
    """Whether it is part of a group that is there as a whole, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A sub-network and its scores."""

    name: str
    spec: SubnetSpec
    scores: tuple[TaskScore, ...]


def evaluate_tasks(
    model: ElasticModel,
    specs: Mapping[str, SubnetSpec],
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    chat_template: bool = False,
    seed: int = 0,
    on_network: OnNetwork | None = None,
) -> list[Measured]:
    """Run tasks on sub-networks, all on the same examples.

    Args:
        model: with a tokenizer.
        specs: the sub-networks, by name.
        tasks: names of tasks and groups.
        data: folder of files that the tasks are made from; by default lm-eval fetches its own.
        limit: examples of each task at most, drawn at random: those of some tasks are sorted by kind.
        batch_size: sequences of a forward pass.
        chat_template: write prompts as messages in the model's own template.
        seed: of the draw.
        on_network: called with the name of each sub-network; what it returns is called with requests answered and in
            all.

    Raises:
        FlextronError: a task is unknown or its files are not there, lm-eval cannot fetch it, or the limit is not
            positive.
    """
    if limit is not None and limit < 1:
        raise FlextronError(f"limit must be at least 1, not {limit}")
    with _quiet():
        loaded = _load(tasks, data)
        samples = None if limit is None else _drawn(loaded["tasks"], limit, seed)
        measured = []
        for name, spec in specs.items():
            on_done = None if on_network is None else on_network(name)
            lm = FlextronLM(model, spec=spec, batch_size=batch_size, on_done=on_done)
            _seed(loaded["tasks"])
            found = run_tasks(
                lm,
                loaded,
                samples=samples,
                bootstrap_iters=_BOOTSTRAP_ROUNDS,
                log_samples=False,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
            )
            measured.append(Measured(name=name, spec=spec, scores=tuple(_scores(found))))
    return measured


def _load(tasks: Sequence[str], data: Path | None) -> Any:
    """Tasks and groups of lm-eval."""
    if not tasks:
        raise FlextronError("there is no task to run; name at least one")
    if data is not None:
        # lm-eval's own tasks are left alone: to look through them takes long
        return TaskManager(include_defaults=False).load([local_task(name, data) for name in tasks])
    manager = TaskManager()
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise FlextronError(f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists those that it has")
    try:
        return manager.load(list(tasks))
    except (OSError, ConnectionError, ValueError) as error:
        raise FlextronError(
            f"lm-eval could not load its data ({error}); name a folder of files with --data, or go online"
        ) from error


def _drawn(tasks: Mapping[str, Any], limit: int, seed: int) -> dict[str, list[int]]:
    """Indices of the examples of each task."""
    drawn = {}
    for name, task in tasks.items():
        count = len(task.eval_docs)
        drawn[name] = sorted(random.Random(seed).sample(range(count), min(limit, count)))
    return drawn


def _seed(tasks: Mapping[str, Any]) -> None:
    """Seed as lm-eval's command line does, so that every sub-network gets the same prompts."""
    random.seed(0)
    np.random.seed(_FEWSHOT_SEED)
    torch.manual_seed(_FEWSHOT_SEED)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _scores(found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Groups and tasks that are in none first, then what groups consist of."""
    groups = {name: children for name, children in found.get("group_subtasks", {}).items() if children}
    within = {child for children in groups.values() for child in children}
    results = found["results"]
    for name in sorted(results, key=lambda name: name in within):
        for key, value in results[name].items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results[name].get(f"{metric}_stderr,{chosen}")
            yield TaskScore(
                task=name,
                metric=metric if chosen == "none" else f"{metric} {chosen}",
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                num_examples=_num_examples(name, found, groups),
                num_shots=found["n-shot"].get(name) if name not in groups else None,
                in_group=name in within,
            )


def _num_examples(name: str, found: Mapping[str, Any], groups: Mapping[str, list[str]]) -> int:
    if name in groups:
        return sum(_num_examples(child, found, groups) for child in groups[name])
    return int(found["n-samples"][name]["effective"])


@contextmanager
def _quiet() -> Iterator[None]:
    """No notes and bars of lm-eval, which would interleave with ours; what it prints goes to stderr."""
    logger, before = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level, in_parallel = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(before, disable=True)
    os.environ["DISABLE_MULTIPROC"] = "1"  # processes that it would fork beside our threads
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = before
        if in_parallel is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = in_parallel
