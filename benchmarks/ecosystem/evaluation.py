"""lm-eval's client of completions against the server, and the same tasks offline.

`FLEXTRON_DATA` names the folder with the tasks' files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from benchmarks import smollm2
from benchmarks.harness import Figure, LeftOutError
from flextron.evals.model import FlextronLM
from flextron.evals.tasks import local_task
from tests.server.running import running

__all__ = ["likelihoods_through_the_server"]

_TASKS, _TARGETS, _LIMIT = ("piqa", "arc_easy", "lambada_openai"), (1.0, 0.6), 10


def _evaluated(lm: Any, folder: Path) -> list[float]:
    """All metrics, and the log-likelihood of each answer."""
    found: dict[str, Any] = simple_evaluate(
        model=lm,
        tasks=[local_task(name, folder) for name in _TASKS],
        task_manager=TaskManager(include_defaults=False),
        limit=_LIMIT,
        bootstrap_iters=0,
    )
    return [number for name in _TASKS for number in _numbers(found["results"][name], found["samples"][name])]


def _numbers(results: dict[str, Any], samples: list[dict[str, Any]]) -> Iterator[float]:
    yield from (value for value in results.values() if isinstance(value, float))
    for sample in samples:
        yield from (float(response[0][0]) for response in sample["resps"])


def likelihoods_through_the_server() -> Figure:
    """Tasks of lm-eval through the server, against the offline evaluation."""
    if "FLEXTRON_DATA" not in os.environ:
        raise LeftOutError("set FLEXTRON_DATA to a folder with eval-olmo and eval-llm-foundry")
    folder, model, differences = Path(os.environ["FLEXTRON_DATA"]), smollm2.elastic(), list[float]()
    with running(model, {"kv_cache_gb": 0.2, "max_num_batched_tokens": 256}) as server:
        for target in _TARGETS:
            url = f"{server.url}/v1/completions"
            client = LocalCompletionsAPI(model=f"tiny@{target:g}", base_url=url, batch_size=8, max_length=2048)
            found, wanted = (_evaluated(lm, folder) for lm in (client, FlextronLM(model, latency=target)))
            differences += [abs(a - b) / max(abs(b), 1e-9) for a, b in zip(found, wanted, strict=True)]
    return Figure(
        name="lm-eval through the server: largest relative difference from offline, of metrics and log-likelihoods",
        value=max(differences),
        unit="relative",
        op="<=",
        bar=1e-4,
        note=f"SmolLM2-135M, {', '.join(_TASKS)}, {_LIMIT} questions each, two targets; {len(differences)} numbers",
    )
