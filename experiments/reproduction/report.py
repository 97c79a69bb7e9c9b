"""From finished runs to what is published: `results.json`, `results.md` and `results.png`."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from experiments.reproduction.figure import draw
from experiments.reproduction.plan import jobs
from experiments.reproduction.scales import ELASTIC_FRACTION
from experiments.reproduction.setting import Setting, Work
from flextron.cli.console import message
from flextron.files import read_json, write_json
from flextron.routing.latency import step_latencies_ms
from flextron.spec import SubnetSpec

__all__ = ["claims", "rows", "write_report"]

_PEERS = ("MatFormer-type", "SortedNet-type", "Minitron-type", "Minitron-type, shared tokens")


def rows(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """One row for every sub-network of every run, with its latency on this device."""
    out = []
    for s in settings:
        results = [r for job in jobs(s) if (r := s.store.result(job.name)) is not None]
        specs = list(dict.fromkeys(SubnetSpec.from_dict(p["spec"]) for r in results for p in r["points"]))
        latencies = _latencies(s, specs)
        for result in results:
            facts = {key: result[key] for key in ("method", "name", *Work.FIELDS)}
            for point in result["points"]:
                ms = latencies[SubnetSpec.from_dict(point["spec"])]
                out.append({"family": s.family, "seed": s.seed, **facts, **point, "latency_ms": ms})
    return out


def _latencies(s: Setting, specs: Sequence[SubnetSpec]) -> dict[SubnetSpec, float]:
    """Decode milliseconds, measured once: they depend on widths, not on weights."""
    path = s.store.path / "latencies.json"
    stored = read_json(path) if path.exists() else []
    known = {SubnetSpec.from_dict(spec): float(ms) for spec, ms in stored}
    if not known.keys() >= set(specs):
        context = min(128, s.scale.context - 1)
        times = step_latencies_ms(s.base(), specs, context=context, repeats=s.scale.latency_repeats)
        known = dict(zip(specs, times, strict=True))
        write_json(path, [[spec.to_dict(), ms] for spec, ms in known.items()])
    return known


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is claimed, size by size and seed by seed, and whether it holds.

    `margin` is the other's loss less Flextron's. A claim holds where that is at least 0 with no more block parameters
    than the other has, or might have had: the budget of a size is what the variant trained end to end has.
    """
    losses = {(r["family"], r["seed"], r["method"], r["size"]): (r["loss"], r["block_params"]) for r in rows}
    out = []
    for (family, seed, method, size), (loss, num) in losses.items():
        ours = losses.get((family, seed, "Flextron", size))
        if ours is None or (method not in ("base", "end to end", *_PEERS)) or (method in _PEERS and size == 1):
            continue
        _, budget = losses.get((family, seed, "end to end", size), (loss, num))
        claim = {"family": family, "seed": seed, "against": method, "size": size, "margin": loss - ours[0]}
        out.append(claim | {"holds": bool(ours[0] <= loss and ours[1] <= max(num, budget))})
    return out


def _summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["family"], row["size"], row["method"]].append(row)
    out = []
    for (family, size, method), group in sorted(groups.items(), key=lambda g: (g[0][0], -g[0][1])):
        mean = {
            key: statistics.fmean(r[key] for r in group)
            for key in ("params", "block_params", "loss", "latency_ms", "tokens", "student_tokens", "seconds")
        }
        spread = max(r["loss"] for r in group) - min(r["loss"] for r in group)
        out.append({"family": family, "size": size, "method": method, "seeds": len(group), **mean, "spread": spread})
    return out


def _table(summary: Sequence[dict[str, Any]], checked: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "Validation loss in nats a token, mean over the seeds; spread is the largest less the smallest. Block"
        " parameters leave out embeddings. Tokens are of text, each counted once; student tokens count each sub-network"
        " that one ran in; the base's do not count to what starts from it. Seconds are of training, on this machine.",
        "",
        "| family | size | method | loss | spread | seeds | block parameters | all parameters | ms a token | tokens |"
        " student tokens | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['family']} | {r['size']:g} | {r['method']} | {r['loss']:.4f} | {r['spread']:.4f} | {r['seeds']} "
        f"| {r['block_params']:,.0f} | {r['params']:,.0f} | {r['latency_ms']:.2f} | {r['tokens']:,.0f} "
        f"| {r['student_tokens']:,.0f} | {r['seconds']:.0f} |"
        for r in summary
    ]
    lines += ["", "Flextron against each, at equal or fewer parameters:", ""]
    lines += ["| family | against | size | mean margin | holds in |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for claim in checked:
        groups[claim["family"], claim["against"], claim["size"]].append(claim)
    for (family, against, size), group in groups.items():
        margin = statistics.fmean(c["margin"] for c in group)
        held = sum(c["holds"] for c in group)
        lines.append(f"| {family} | {against} | {size:g} | {margin:+.4f} | {held} of {len(group)} seeds |")
    return "\n".join(lines) + "\n"


def write_report(settings: Sequence[Setting], output: Path) -> dict[str, Any]:
    """Write all three files; returns what went into the JSON."""
    measured = rows(settings)
    checked, summary = claims(measured), _summary(measured)
    gpu = torch.cuda.is_available()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    results = {
        "scale": settings[0].scale.to_dict(),
        "elastic_fraction": ELASTIC_FRACTION,
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if gpu else None,
        },
        "versions": {name: version(name) for name in ("flextron", "torch", "transformers", "tokenizers")},
        "summary": summary,
        "claims": checked,
        "rows": measured,
    }
    write_json(output / "results.json", results)
    (output / "results.md").write_text(_table(summary, checked), encoding="utf-8")
    draw(summary, output / "results.png")
    message(f"{sum(c['holds'] for c in checked)} of {len(checked)} comparisons hold; see {output / 'results.md'}")
    return results
