"""What a simulated load got, in the words of `flextron bench serve`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flextron.bench.metrics import Objectives, Summary, summarize
from flextron.bench.timeline import Timeline
from flextron.simulation.cluster import Run
from flextron.simulation.load import Arrivals
from flextron.simulation.machine import Machine
from flextron.simulation.replica import Served
from flextron.simulation.times import PICOSECONDS

__all__ = ["Simulated", "rows", "timeline"]


def timeline(served: Served) -> Timeline:
    """A request as a client would have seen it; of its tokens the first and the last."""
    arrival, at = served.arrival, served.arrival.ps / PICOSECONDS
    is_refused = served.network < 0
    first, last = served.first_ps / PICOSECONDS, served.last_ps / PICOSECONDS
    return Timeline(
        index=arrival.index,
        scheduled_s=at,
        sent_s=at,
        end_s=at if is_refused else last,
        chunk_s=() if is_refused else (first,) if arrival.output == 1 else (first, last),
        prompt_tokens=arrival.prompt,
        wanted_tokens=arrival.output,
        usage_tokens=None if is_refused else arrival.output,
        error="refused" if is_refused else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """Figures of one simulated load on some replicas."""

    load: str
    """Where the requests are from, in words."""
    num_clipped: int
    """Requests that were shortened to the limits or the machine's context."""
    num_replicas: int
    is_elastic: bool
    """Whether requests became narrower under load."""
    is_finetuning: bool
    summary: Summary
    narrowed: float
    """Share of the answered requests that got less than the full network."""
    mean_target: float
    """Mean latency target of their tokens, 1 without narrowing."""
    mean_loss: float | None
    """Mean loss of the sub-networks of their tokens in nats; None where a loss is not known."""
    finetuned_tokens_per_s: float | None
    """Tokens of examples that went both ways through the model, over all replicas; None without finetuning."""
    busy: float
    """Share of the replicas' time that iterations took."""
    num_iterations: int
    num_preemptions: int
    seconds: float
    """Simulated time, to the last end."""

    @classmethod
    def of(
        cls,
        run: Run,
        machine: Machine,
        arrivals: Arrivals,
        objectives: Objectives,
        num_replicas: int,
        *,
        elastic: bool,
        finetuning: bool,
    ) -> Simulated:
        """Compute the figures of a run that was played to its end."""
        lines = [timeline(served) for served in run.served]
        tokens = [0] * len(machine.networks)
        counts = [0] * len(machine.networks)
        for served in run.served:
            if served.network >= 0:
                counts[served.network] += 1
                tokens[served.network] += served.arrival.output
        of_all, num_tokens = max(1, sum(counts)), max(1, sum(tokens))
        used = [(t, network) for t, network in zip(tokens, machine.networks, strict=True) if t]
        losses = [(t, network.loss) for t, network in used]
        return cls(
            load=arrivals.process,
            num_clipped=arrivals.num_clipped,
            num_replicas=num_replicas,
            is_elastic=elastic,
            is_finetuning=finetuning,
            summary=summarize(lines, objectives, run.seconds),
            narrowed=1 - counts[0] / of_all,
            mean_target=sum(t * network.latency for t, network in used) / num_tokens,
            mean_loss=None
            if any(loss is None for _, loss in losses)
            else sum(t * loss for t, loss in losses if loss is not None) / num_tokens,
            finetuned_tokens_per_s=run.trained_tokens / run.training_seconds if finetuning else None,
            busy=run.busy_seconds / max(run.seconds * num_replicas, 1e-12),
            num_iterations=run.num_iterations,
            num_preemptions=run.num_preemptions,
            seconds=run.seconds,
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form. Gaps between single tokens are not recorded, so there is no spread of them."""
        values = asdict(self)
        for name in ("itl_ms", "num_chunks", "tokens_counted_by"):
            del values["summary"][name]
        return values

    def row(self) -> dict[str, Any]:
        """A line of a table."""
        summary = self.summary
        ttft, tpot = summary.ttft_ms, summary.tpot_ms
        return {
            "replicas": self.num_replicas,
            "elastic": "yes" if self.is_elastic else "no",
            "attainment": summary.attainment,
            "TTFT p50": ttft and ttft.p50,
            "TTFT p99": ttft and ttft.p99,
            "TPOT p50": tpot and tpot.p50,
            "TPOT p99": tpot and tpot.p99,
            "refused": summary.num_requests - summary.num_ok,
            "mean target": self.mean_target,
            "finetuned tokens/s": self.finetuned_tokens_per_s,
        }


def rows(results: Sequence[Simulated]) -> list[dict[str, Any]]:
    """Lines of a table; columns in which nothing happened are left out."""
    found = [result.row() for result in results]
    empty: dict[str, tuple[object, ...]] = {"finetuned tokens/s": (None,), "attainment": (None,), "refused": (0,)}
    if not any(result.is_elastic for result in results):
        empty |= {"elastic": ("no",), "mean target": (1.0,)}
    unused = {name for name, values in empty.items() if all(row[name] in values for row in found)}
    return [{name: value for name, value in row.items() if name not in unused} for row in found]
