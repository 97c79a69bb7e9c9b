"""The result of a benchmark as JSON, and as rows of the tables that people read."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flextron.bench.client import Server
from flextron.bench.metrics import Objectives, Spread, Summary, duration_s, summarize
from flextron.bench.plan import Load, Plan
from flextron.bench.runner import BenchmarkRun
from flextron.bench.timeline import Timeline

__all__ = ["Report", "make_report"]

_LATENCIES = {"ttft_ms": "TTFT ms", "tpot_ms": "TPOT ms", "itl_ms": "ITL ms", "e2e_ms": "E2E ms"}

_LATE_MS = 20.0
"""Above this a late client deserves a word: it is a visible part of a short TTFT."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that a run has to say."""

    server: Server
    load: Load
    plan: Plan
    run: BenchmarkRun
    objectives: Objectives
    concurrency: int | None
    """Requests under way at once, at most."""
    warmup: int
    """Requests beforehand, which are not in any figure."""
    duration_s: float
    """Seconds from the first scheduled arrival to the last end."""
    summary: Summary
    by_target: dict[str, Summary]
    """Parts of the run by the suffix of the model's name; rates are over the whole run's time."""
    late_ms: Spread | None
    """How late the client sent requests: waiting for a slot, and its own sluggishness."""

    def to_dict(self, *, requests: bool = True) -> dict[str, Any]:
        """The JSON form.

        Args:
            requests: whether to tell of each request, too.
        """
        load = asdict(self.load)
        load["dataset"] = _name(self.load.dataset)
        load["arrivals"]["trace"] = _name(self.load.arrivals.trace)
        server = asdict(self.server)
        del server["api_key"]
        versions = {"flextron": version("flextron"), "httpx": version("httpx"), "python": platform.python_version()}
        result: dict[str, Any] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions,
            "server": server,
            "load": load,
            "arrivals": {
                "process": self.plan.process,
                "offered_rate_per_s": self.plan.offered_rate,
                "num_planned": len(self.plan.requests),
                "num_clipped": self.plan.num_clipped,
                "concurrency": self.concurrency,
                "warmup": self.warmup,
            },
            "objectives": asdict(self.objectives),
            "duration_s": self.duration_s,
            "interrupted": self.run.interrupted,
            "num_unfinished": self.run.num_unfinished,
            "late_ms": asdict(self.late_ms) if self.late_ms else None,
            "summary": self.summary.to_dict(),
            "by_target": {target: summary.to_dict() for target, summary in self.by_target.items()},
            "error_examples": _examples(self.run.timelines),
        }
        if requests:
            ordered = sorted(self.run.timelines, key=lambda line: line.index)
            result["requests"] = [_record(line, self.objectives) for line in ordered]
        return result

    def facts(self) -> dict[str, Any]:
        """What is no distribution, for a table of one row."""
        summary = self.summary
        facts: dict[str, Any] = {
            "arrivals": self.plan.process,
            "requests offered/s": self.plan.offered_rate,
            "requests": f"{summary.num_ok} ok of {summary.num_requests}",
        }
        if self.run.interrupted:
            facts["unfinished"] = self.run.num_unfinished
        for kind, count in summary.errors.items():
            facts[f"error: {kind}"] = f"{count}  {_examples(self.run.timelines)[kind]}".rstrip()
        facts |= {
            "duration s": self.duration_s,
            "requests/s": summary.requests_per_s,
            "output tokens/s": summary.output_tokens_per_s,
            "total tokens/s": summary.total_tokens_per_s,
            "output tokens": f"{summary.output_tokens:,} of {summary.wanted_tokens:,} asked for",
            "tokens counted by": summary.tokens_counted_by,
        }
        if self.plan.num_clipped:
            facts["requests clipped"] = self.plan.num_clipped
        if self.objectives:
            facts |= {"SLO attainment": summary.attainment, "goodput requests/s": summary.goodput_per_s}
        return facts

    def latencies(self) -> list[dict[str, Any]]:
        """Distributions in milliseconds, for a table; the client's own lateness last."""
        spreads = {title: getattr(self.summary, name) for name, title in _LATENCIES.items()}
        spreads["sent late ms"] = self.late_ms
        return [{"latency": title, **asdict(spread)} for title, spread in spreads.items() if spread is not None]

    def targets(self) -> list[dict[str, Any]]:
        """One row a target, if there are any."""
        rows = []
        for target, summary in self.by_target.items():
            row: dict[str, Any] = {"target": target, "requests": summary.num_requests, "ok": summary.num_ok}
            for name, title in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT")):
                spread = getattr(summary, name)
                row |= {f"{title} p50": spread and spread.p50, f"{title} p99": spread and spread.p99}
            row["output tokens/s"] = summary.output_tokens_per_s
            if self.objectives:
                row["attainment"] = summary.attainment
            rows.append(row)
        return rows

    def warnings(self) -> list[str]:
        """What keeps the figures from meaning what they seem to."""
        found = []
        if self.late_ms is not None and self.late_ms.p99 > _LATE_MS:
            cause = "too slow a client" if self.concurrency is None else "--concurrency or too slow a client"
            found.append(
                f"1 % of the requests were sent at least {self.late_ms.p99:.0f} ms late ({cause}); "
                "that wait is part of TTFT and E2E"
            )
        if self.summary.tokens_counted_by in ("chunks", "mixed"):
            found.append("the server sent no usage for some requests; their output tokens are pieces of text")
        if self.summary.output_tokens < self.summary.wanted_tokens:
            found.append("answers were shorter than asked for; vLLM and llama.cpp give full lengths with --ignore-eos")
        return found


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _examples(timelines: Sequence[Timeline]) -> dict[str, str]:
    """One detail for each kind of error."""
    return {line.error: line.detail for line in reversed(timelines) if line.error is not None}


def _record(line: Timeline, objectives: Objectives) -> dict[str, Any]:
    def ms(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1e3, 3)

    record: dict[str, Any] = {
        "index": line.index,
        "target": line.target,
        "scheduled_s": round(line.scheduled_s, 6),
        "late_ms": ms(line.late_s),
        "ttft_ms": ms(line.ttft_s),
        "tpot_ms": ms(line.tpot_s),
        "e2e_ms": ms(line.e2e_s),
        "prompt_tokens": line.prompt_tokens,
        "output_tokens": line.output_tokens,
        "num_chunks": len(line.chunk_s),
        "error": line.error,
    }
    return record | ({"met": objectives.met_by(line)} if objectives else {})


def make_report(
    run: BenchmarkRun,
    *,
    server: Server,
    load: Load,
    plan: Plan,
    objectives: Objectives,
    concurrency: int | None,
    warmup: int,
) -> Report:
    """Compute all figures of a run."""
    duration = duration_s(run.timelines)
    targets = {target: [line for line in run.timelines if line.target == target] for target in load.targets}
    return Report(
        server=server,
        load=load,
        plan=plan,
        run=run,
        objectives=objectives,
        concurrency=concurrency,
        warmup=warmup,
        duration_s=duration,
        summary=summarize(run.timelines, objectives, duration),
        by_target={target: summarize(lines, objectives, duration) for target, lines in targets.items()},
        late_ms=Spread.of([line.late_s for line in run.timelines]),
    )
