"""Replicas under load: one is killed, all are replaced. On a real Ray on this machine, with the packaged model."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

from benchmarks.harness import Figure, LeftOutError
from flextron.replicas.local import deploy, ray_of_its_own
from tests.replicas.serving import Clients, both_run, pids, plan_for, served
from tests.server.running import wait_until
from tests.trained import trained_model

__all__ = ["back_after_a_kill", "failed_in_an_update", "lost_in_a_kill"]

_CLIENTS, _BETWEEN, _KILLS = 6, 60, 3


@contextmanager
def _ray() -> Iterator[Path]:
    """Ray, and a directory with the model."""
    try:
        from ray import serve
    except ImportError as error:
        raise LeftOutError("needs Ray Serve: pip install 'flextron[ray]'") from error
    with tempfile.TemporaryDirectory() as directory, ray_of_its_own(2):
        serve.start(proxy_location="Disabled")
        model = Path(directory) / "model"
        trained_model().save(model)
        yield model
        serve.shutdown()


@cache
def _measured() -> tuple[Clients, list[float], Clients]:
    """What clients saw of kills, seconds until two replicas answered again, and what they saw of an update."""
    seconds = []
    with _ray() as model:
        plan = plan_for(model)
        with served(plan) as made:
            with Clients(made.url, _CLIENTS) as killing:
                for _ in range(_KILLS):
                    killing.wait_for(_BETWEEN)
                    killed, begun = pids().pop(), time.monotonic()
                    os.kill(killed, signal.SIGKILL)
                    wait_until(lambda: len(pids() - {killed}) == 2 and both_run(), 120)  # noqa: B023
                    seconds.append(time.monotonic() - begun)
            with Clients(made.url, _CLIENTS) as updating:
                before = pids()
                updating.wait_for(_BETWEEN)
                deploy(replace(plan, revision="2"))
                updating.wait_for(_BETWEEN)
                assert not before & pids()
    return killing, seconds, updating


def lost_in_a_kill() -> Figure:
    """Requests that nobody answered."""
    clients, _, _ = _measured()
    counts = clients.counts
    assert counts["broken"] == 0, clients.reasons
    return Figure(
        name=f"a replica of 2 killed under load, {_KILLS} times: requests lost that had not begun to stream",
        value=counts["lost"],
        unit="requests",
        op="==",
        bar=0,
        peer={"name": "answered", "value": counts["whole"]},
        note=f"kill -9 of its process; {_CLIENTS} clients, each asking again 0.1 s after an answer, half of them for "
        f"streams; {counts['ended']} streams had begun, and ended with an error as their last event",
    )


def back_after_a_kill() -> Figure:
    """Time until the killed replica is back."""
    _, seconds, _ = _measured()
    ordered = sorted(seconds)
    return Figure(
        name=f"a replica of 2 killed under load: back after, the longest of {_KILLS}",
        value=ordered[-1],
        unit="s",
        op="<=",
        bar=30,
        spread=(ordered[0], ordered[len(ordered) // 2], ordered[-1]),
        note="from the kill until two replicas are healthy; half of it is the import of torch and transformers",
    )


def failed_in_an_update() -> Figure:
    """Requests that an update broke."""
    _, _, clients = _measured()
    counts = clients.counts
    return Figure(
        name="a rolling update of 2 replicas under load: failed requests",
        value=counts.total() - counts["whole"],
        unit="requests",
        op="==",
        bar=0,
        peer={"name": "answered", "value": counts["whole"]},
        note="from the first new replica to the last old one, and before and after it",
    )
