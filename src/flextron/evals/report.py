"""Tables and JSON of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flextron.api import ElasticModel
from flextron.evals.run import Measured
from flextron.spec import SubnetSpec

__all__ = ["network_rows", "score_rows", "to_json"]


def _facts(model: ElasticModel, spec: SubnetSpec) -> dict[str, Any]:
    """Parameters, and what was measured of a sub-network here."""
    facts: dict[str, Any] = {"parameters": model.num_parameters(spec)}
    points = () if model.frontier is None else model.frontier.points
    point = next((point for point in points if point.spec == spec), None)
    if point is not None:
        facts |= {"latency": point.latency, "latency_ms": point.latency_ms}
    return facts


def network_rows(model: ElasticModel, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row for each sub-network."""
    facts = [_facts(model, one.spec) for one in measured]
    columns = list(dict.fromkeys(name for own in facts for name in own))
    return [
        {"target": one.name, **{name: own.get(name) for name in columns}, "subnet": one.spec.describe()}
        for one, own in zip(measured, facts, strict=True)
    ]


def score_rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row for each metric of tasks and groups, a column for each sub-network; parts of groups are left out."""
    rows = []
    for same in zip(*(one.scores for one in measured), strict=True):
        if same[0].in_group:
            continue
        row: dict[str, Any] = {"task": same[0].task, "metric": same[0].metric, "examples": same[0].num_examples}
        for one, score in zip(measured, same, strict=True):
            row[one.name] = _with_error(score.value, score.standard_error)
        rows.append(row)
    return rows


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.3f} ±{error:.3f}"


def to_json(model: ElasticModel, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Everything, parts of groups included."""
    return [
        {
            "target": one.name,
            **_facts(model, one.spec),
            "subnet": one.spec.to_dict(),
            "scores": [
                {
                    "task": score.task,
                    "metric": score.metric,
                    "value": score.value,
                    "standard_error": score.standard_error,
                    "examples": score.num_examples,
                    "shots": score.num_shots,
                    "in_group": score.in_group,
                }
                for score in one.scores
            ],
        }
        for one in measured
    ]
