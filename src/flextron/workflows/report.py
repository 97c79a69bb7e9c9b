"""Rows for tables: what a model is, and what was measured of it."""

from __future__ import annotations

from typing import Any

from flextron.api import ElasticModel
from flextron.scoring.mean_loss import Perplexity

__all__ = ["frontier_rows", "perplexity_rows", "summary"]


def summary(model: ElasticModel) -> dict[str, Any]:
    """A model in one row."""
    space, config = model.space, model.decoder.config
    return {
        "source": str(model.info.provenance.get("source", "")),
        "family": config.family,
        "parameters": model.num_parameters(),
        "smallest": model.num_parameters(space.smallest),
        "layers": f"{space.num_hidden_layers - space.max_skipped_layers}-{space.num_hidden_layers}",
        "mlp_widths": " ".join(map(str, space.intermediate_sizes)),
        "groups": " ".join(map(str, space.num_groups)),
        "subnets": f"10^{space.log10_size:.0f}",
        "trained_tokens": int(model.info.recipe.get("num_tokens", 0)),
    }


def frontier_rows(model: ElasticModel) -> list[dict[str, Any]]:
    """The measured sub-networks that nothing beats, by falling latency; none before profiling."""
    if model.frontier is None:
        return []
    return [
        {
            "latency": point.latency,
            "latency_ms": point.latency_ms,
            "parameters": point.params,
            "mem_mb": point.mem_bytes / 1e6,
            "loss": point.loss,
            "found_as": point.kind,
            "subnet": point.spec.describe(),
        }
        for point in model.frontier.best()
    ]


def perplexity_rows(results: dict[str, Perplexity]) -> list[dict[str, Any]]:
    """Named perplexities."""
    return [
        {"subnet": name, "loss": p.loss, "perplexity": p.perplexity, "tokens": p.num_tokens}
        for name, p in results.items()
    ]
