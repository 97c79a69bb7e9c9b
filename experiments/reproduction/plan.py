"""The runs of one family and seed, in order, and what they cost; each runs once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from experiments.reproduction import methods
from experiments.reproduction.methods import ABLATIONS, ROUTER_ABLATIONS, Run
from experiments.reproduction.scales import ELASTIC_FRACTION
from experiments.reproduction.setting import Setting
from flextron.cli.console import message

__all__ = ["Job", "execute", "jobs"]


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    name: str
    cost: float
    """Roughly, in pretrainings of the base."""
    run: Callable[[Setting, str], Run]


def jobs(s: Setting) -> list[Job]:
    """All runs, the base first; a run needs only runs before it. Ablations are of the first Llama-type base alone."""
    sizes, post = s.scale.sizes, ELASTIC_FRACTION
    sandwich, ablated = 3.5 * post, s.family == "llama" and s.seed == 0
    joint = s.scale.joint_fraction
    return [
        Job("base", 1.0, methods.base),
        Job("continued", post, methods.continued),
        Job("flextron-elastic", sandwich * (1 - joint), methods.flextron_elastic),
        Job("flextron", sandwich * joint, methods.flextron),
        Job("matformer", sandwich, methods.matformer),
        Job("sortednet", sandwich, methods.sortednet),
        *(Job(f"minitron-{size:g}", 1.1 * post, partial(_minitron, size=size)) for size in sizes),
        *(
            Job(f"minitron-shared-{size:g}", 0.4 * post, partial(_minitron, size=size, fraction=1 / len(sizes)))
            for size in sizes
        ),
        *(Job(f"variant-{size:g}", 0.3 + 0.7 * size, partial(_variant, size=size)) for size in sizes),
        *(Job(f"ablation-{name}", sandwich, methods.ablation) for name in ABLATIONS if ablated),
        *(Job(f"ablation-{name}", sandwich, run) for name, run in ROUTER_ABLATIONS.items() if ablated),
    ]


def _variant(s: Setting, name: str, *, size: float) -> Run:
    return methods.base(s, name, s.variants[size], size)


def _minitron(s: Setting, name: str, *, size: float, fraction: float = 1.0) -> Run:
    return methods.minitron(s, name, size, fraction)


def execute(s: Setting) -> None:
    """Do what is not done yet, and say how long the rest may take."""
    everything = jobs(s)
    todo = [job for job in everything if s.store.result(job.name) is None]
    started, spent = time.monotonic(), 0.0
    for job in todo:
        s.store.once(job.name, partial(job.run, s, job.name))
        spent += job.cost
        rest = sum(j.cost for j in todo) - spent
        minutes = rest * (time.monotonic() - started) / spent / 60
        message(f"{s.family}-{s.seed}: {job.name} is done; about {minutes:.0f} min left for this family and seed")
