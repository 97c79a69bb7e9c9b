"""The tasks that the field reports, on the package's elastic SmolLM2: targets, weights, standard errors.

`python -m experiments.elastification.tasks --data DIR --output FILE` scores the full network without the adapter, and
the sub-networks for latencies 1.0, 0.75 and 0.5 with it, each in float32 and with int8's numbers. All networks answer
the same questions, drawn at random. What is done is kept in the JSON file, so that a killed command goes on where it
was. In the end it prints the table in Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import flextron
from experiments.elastification.alternatives import rounded
from flextron.api.packaged import boxed_adapter
from flextron.evals.run import evaluate_tasks
from flextron.files import read_json, write_json
from flextron.kernels.layout import Weights
from flextron.spec import SubnetSpec
from flextron.workflows.demo import default_model

__all__ = ["TASKS", "main", "table"]

TASKS = {
    "arc_easy": "acc",
    "hellaswag": "acc_norm",
    "lambada_openai": "acc",
    "mmlu": "acc",
    "piqa": "acc",
    "winogrande": "acc",
}
"""Tasks, and the metric that the field reports of each."""
_TARGETS = (1.0, 0.75, 0.5)
_WEIGHTS: tuple[Weights, ...] = ("float32", "int8")
_WITHOUT = "full network, without the adapter"
_SUBJECTS = 57
"""Of MMLU, each of which gets as many questions as the others."""


def _networks() -> Iterator[tuple[str, flextron.ElasticModel, SubnetSpec]]:
    """Name, model and sub-network of each row."""
    model = flextron.load(default_model(), elastic=boxed_adapter())
    assert model.adapter is not None
    model.profile()
    specs = {target: model.space.full if target == 1 else model.select(latency=target) for target in _TARGETS}
    for target, spec in specs.items():
        yield f"{target:g} of the latency", model, spec
    model.adapter.add_to(model.decoder, -1)
    yield _WITHOUT, model, model.space.full


def main() -> None:
    """Score what is not scored yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the tasks' files")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the scores")
    parser.add_argument("--limit", type=int, default=200, help="questions of each task, of MMLU one a subject at least")
    args = parser.parse_args()
    rows: dict[str, Any] = read_json(args.output) if args.output.exists() else {}
    for name, model, spec in _networks():
        decoder = model.decoder
        for weights in _WEIGHTS:
            scored = rows.setdefault(f"{name}, {weights}", {})
            model.decoder = rounded(decoder, weights)
            for task, metric in TASKS.items():
                if task in scored:
                    continue
                limit = max(1, args.limit // _SUBJECTS) if task == "mmlu" else args.limit
                (found,) = evaluate_tasks(model, {name: spec}, [task], data=args.data, limit=limit)
                score = next(s for s in found.scores if s.task == task and s.metric == metric)
                scored[task] = asdict(score)
                write_json(args.output, rows)
        model.decoder = decoder
    print(table(rows))  # noqa: T201


def table(rows: Mapping[str, Any]) -> str:
    """Percent and standard errors, a row a network, in Markdown."""
    lines = [f"| network | {' | '.join(TASKS)} |", "|---|" + "---|" * len(TASKS)]
    for name, scored in rows.items():
        cells = [f"{100 * scored[t]['value']:.1f} ± {100 * scored[t]['standard_error']:.1f}" for t in TASKS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
