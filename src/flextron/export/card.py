"""Model cards in the hub's form: front matter in YAML, then how the model was made and what was measured of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from flextron.elastic import ElasticInfo
from flextron.routing import Frontier, FrontierPoint
from flextron.spec import SubnetSpec

__all__ = ["adapter_card", "subnet_card"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PROJECT = "flextron"


def subnet_card(
    info: ElasticInfo,
    spec: SubnetSpec,
    *,
    num_parameters: int,
    frontier: Frontier | None,
    library: str,
    usage: str,
    notes: Sequence[str] = (),
) -> str:
    """The card of a sub-network that was written as a model of its own.

    Args:
        info: how the elastic model was made.
        spec: the sub-network.
        num_parameters: its parameters, embeddings included.
        frontier: what was measured of it and its siblings, if anything was.
        library: hub's name of the library that loads the files.
        usage: Python or shell that runs them, without a fence.
        notes: sentences about the files.
    """
    source = info.provenance.get("source")
    return "\n".join(
        (
            _front_matter(source, library, ["elastic", "pruned"]),
            f"# A sub-network of {_shown(source)}",
            "",
            f"{num_parameters:,} parameters: {spec.describe()}. It was cut out of an elastic model, which holds a "
            "sub-network for every latency and size, and it runs without that model.",
            *(f"\n{note}" for note in notes),
            f"\n## Use\n\n```\n{usage.strip()}\n```",
            _made(info),
            _measured(frontier, spec),
            "## Widths\n\nLayer by layer, 0 for a half that is skipped; a layer with two zeros is left out.\n",
            _widths(spec),
            "",
        )
    )


def adapter_card(info: ElasticInfo, *, base: str, rank: int, losses: Iterable[tuple[SubnetSpec, int, float]]) -> str:
    """The card of an elastic adapter.

    Args:
        info: how it was made.
        base: the model for which it is.
        rank: rank of its updates.
        losses: sub-networks with their parameters and losses, if they were measured.
    """
    rows = [(s.describe(), f"{params:,}", f"{loss:.4f}") for s, params, loss in losses]
    table = _table(("sub-network", "parameters", "loss, nats a token"), rows)
    return "\n".join(
        (
            _front_matter(base, _PROJECT, ["elastic", "adapter"]),
            f"# An elastic adapter for {_shown(base)}",
            "",
            f"Low-rank updates of rank {rank} that turn the model into an elastic one, with a sub-network for every "
            "latency and size.",
            "\n## Use\n\n```python\nimport flextron\n",
            f'model = flextron.load("{_shown(base)}", elastic="PATH_OR_HUB_ID")\n```',
            _made(info),
            f"## Sub-networks\n\n{table}" if rows else "",
            "",
        )
    )


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def _shown(source: object) -> str:
    """A model's name for others: its hub id, or the last part of a path, whose rest says nothing to them."""
    text = str(source or "")
    return text if _is_hub_id(text) else Path(text).name or "a pretrained model"


def _front_matter(source: object, library: str, tags: Sequence[str]) -> str:
    data = ModelCardData(
        library_name=library,
        base_model=str(source) if _is_hub_id(str(source or "")) else None,
        pipeline_tag="text-generation",
        tags=[_PROJECT, *tags],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _made(info: ElasticInfo) -> str:
    provenance = dict(info.provenance) | {"source": _shown(info.provenance.get("source"))}
    facts = {"provenance": provenance, "recipe": dict(info.recipe)}
    return f"\n## How it was made\n\n```json\n{json.dumps(facts, indent=1, default=str)}\n```\n"


def _measured(frontier: Frontier | None, spec: SubnetSpec) -> str:
    """The sub-networks that no other beats, and this one."""
    if frontier is None:
        return "## Sub-networks\n\nNothing was measured.\n"
    points = list(frontier.best())
    points += [p for p in frontier.points if p.spec == spec and p not in points]
    points.sort(key=lambda point: -point.latency_ms)
    header = ("sub-network", "parameters", "MB", "latency", "ms a token", "loss, nats a token", "")
    table = _table(header, [_row(point, "this one" if point.spec == spec else "") for point in points])
    return (
        f"## Sub-networks\n\nLatencies are of decode steps in flextron on `{frontier.device}`; losses of "
        f"{frontier.text or 'the validation text'}.\n\n{table}\n"
    )


def _row(point: FrontierPoint, mark: str) -> tuple[str, ...]:
    return (
        point.spec.describe(),
        f"{point.params:,}",
        f"{point.mem_bytes / 1e6:.1f}",
        f"{point.latency:.3f}",
        f"{point.latency_ms:.3g}",
        f"{point.loss:.4f}",
        mark,
    )


def _widths(spec: SubnetSpec) -> str:
    rows = [(str(i), str(layer.intermediate_size), str(layer.num_groups)) for i, layer in enumerate(spec.layers)]
    return _table(("layer", "MLP neurons", "attention groups"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
