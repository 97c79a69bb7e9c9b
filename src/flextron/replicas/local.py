"""`flextron serve --replicas`: a Ray of its own or a cluster's, the replicas there, and the ingress in this process."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from flextron.errors import FlextronError
from flextron.replicas.plan import Plan
from flextron.server.browsers import is_loopback
from flextron.server.run import DrainingServer, listen, log_to_stderr, server_config, told_address

__all__ = ["deploy", "ray_of_its_own", "serve_replicas"]

_STORE_BYTES = 200 * 2**20
"""Object store of a local Ray: room for bodies of requests on their way."""


@contextmanager
def ray_of_its_own(num_replicas: int) -> Iterator[None]:
    """A Ray on this machine alone, without a dashboard and without reports to its makers."""
    _set_up()
    import ray

    # what replicas reserve are names, not cores: in an update old and new ones are there at once
    cpus = 2 * max(os.cpu_count() or 1, num_replicas) + 2
    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=_STORE_BYTES,
        logging_level="WARNING",
    )
    try:
        yield
    finally:
        ray.shutdown()


def _set_up() -> None:
    """Choose what Ray reads once, when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "ray" not in sys.modules:
        # its ports are open to the network, and who is let in may run code
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def _ray_at(address: str | None, num_replicas: int) -> Iterator[None]:
    """Ray, and Serve on it.

    Raises:
        FlextronError: the cluster cannot be reached.
    """
    from ray import serve

    from flextron.replicas.application import NAME

    with ray_of_its_own(num_replicas) if address is None else _ray_elsewhere(address):
        try:
            yield
        finally:
            # replicas end in order, with their jobs saved
            serve.delete(NAME)


@contextmanager
def _ray_elsewhere(address: str) -> Iterator[None]:
    import ray

    try:
        ray.init(address=address, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise FlextronError(f"there is no Ray cluster at {address} ({error}); check --ray-address") from error
    try:
        yield
    finally:
        ray.shutdown()


def deploy(plan: Plan, kind: type | None = None) -> Any:
    """Start the replicas, or replace those of another plan one after the other; waits until they serve.

    Args:
        plan: what they run.
        kind: the class of a replica.

    Returns:
        Serve's handle.

    Raises:
        FlextronError: they do not start.
    """
    from ray import serve

    from flextron.replicas.application import NAME, replicas
    from flextron.replicas.replica import Replica

    try:
        return serve.run(replicas(plan, kind or Replica), name=NAME, route_prefix=None)
    except RuntimeError as error:
        status = serve.status().applications.get(NAME)
        told = [] if status is None else [d.message for d in status.deployments.values()]
        raise FlextronError(_reason("\n".join(told) or str(error))) from error


def _reason(told: str) -> str:
    """The sentence of our own error, out of what Serve tells of a replica that did not start."""
    marks = ("FlextronError: ", "NoSpaceError: ")
    lines = [line.partition(mark)[2] for line in told.splitlines() for mark in marks if mark in line]
    return f"the replicas do not start: {lines[-1] if lines else told}"


def serve_replicas(plan: Plan, host: str, port: int, address: str | None, say: Callable[[str], None]) -> None:
    """Serve until a signal and until running answers have ended. SIGHUP loads the model anew, replica by replica.

    Args:
        plan: what the replicas run.
        host: address to listen on.
        port: its port; 0 is a free one.
        address: of a Ray cluster; None for a Ray of its own.
        say: tells the operator.

    Raises:
        FlextronError: Ray is not there, the address cannot be had, or the replicas do not start.
    """
    if address is None:
        _set_up()
    try:
        import ray.serve
    except ImportError as error:
        raise FlextronError("replicas need Ray Serve; install it with: pip install 'flextron[ray]'") from error
    log_to_stderr()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    sock = listen(host, port)
    say(f"starting {plan.replicas} replicas of {plan.directory}")
    with _ray_at(address, plan.max_replicas or plan.replicas):
        plan = _fitted(plan, address)
        # where Serve runs already, this changes nothing
        ray.serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        handle = deploy(plan)
        for said in handle.complaints.remote().result():
            say(said)
        if plan.server.api_key is None and not is_loopback(host):
            say(f"anyone who reaches {host} may use the model; --api-key asks for a key")
        say(told_address(plan.server, host, sock))
        asyncio.run(_serve(plan, handle, sock, say))


def _fitted(plan: Plan, address: str | None) -> Plan:
    """What a replica takes: a part of this machine, or a GPU of a cluster that has some."""
    import ray

    num_gpus = ray.cluster_resources().get("GPU", 0)
    if num_gpus and plan.device != "cpu":
        # on one machine several may share a GPU
        share = 1.0 if address is not None else min(1.0, num_gpus / (plan.max_replicas or plan.replicas))
        plan = replace(plan, num_gpus=share)
    if address is not None:
        return plan
    return replace(plan, num_cpus=max(1, (os.cpu_count() or 1) // plan.replicas))


async def _serve(plan: Plan, handle: Any, sock: socket.socket, say: Callable[[str], None]) -> None:
    from flextron.replicas.application import ingress_of

    ingress, updates, updating = ingress_of(handle, plan), 0, asyncio.Lock()

    async def update() -> None:
        nonlocal updates
        async with updating:
            updates += 1
            say("loading the model anew, replica by replica")
            try:
                await asyncio.to_thread(deploy, replace(plan, revision=str(updates)))
                say("all replicas are new")
            except FlextronError as error:
                say(str(error))

    tasks: set[asyncio.Task[None]] = set()

    def hang_up() -> None:
        task = asyncio.ensure_future(update())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
    await DrainingServer(server_config(ingress, plan.server.client_seconds), ingress).serve(sockets=[sock])
