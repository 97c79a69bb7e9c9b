"""The deployments: replicas, and for a cluster an ingress; what Serve's configurations import."""

from __future__ import annotations

import math
from typing import Any

from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flextron.replicas.ingress import Ingress
from flextron.replicas.plan import Plan, plan_of
from flextron.replicas.replica import Replica

__all__ = ["NAME", "build", "desired", "ingress_of", "replicas", "scale"]

NAME = "flextron"
_LOSSES = (RayActorError, ObjectLostError, WorkerCrashedError, DeploymentUnavailableError)
_BUSY = 0.75
"""Share of the sequences that may run at once above which another replica is started."""
_MOST_STARTS = 3
"""Times that replicas are tried before a plan is refused."""
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


def desired(num_requests: float, caps: list[float], num_replicas: int, per_replica: float) -> float:
    """How many replicas the load needs.

    Args:
        num_requests: running and waiting ones of all replicas.
        caps: for each replica the latency target to which requests have been narrowed; 1 where they are not.
        num_replicas: replicas now.
        per_replica: requests that one should have.

    Returns:
        Enough for the queue; and where requests were narrowed, enough to do the same at full width.
    """
    by_queue = num_requests / per_replica
    cap = sum(caps) / len(caps) if caps else 1.0
    return max(by_queue, num_replicas / cap) if cap < 1 else by_queue


def scale(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """`desired` as Serve asks for it."""
    caps = list((context.aggregated_metrics or {}).get("latency_cap", {}).values())
    config = context.config
    wanted = math.ceil(
        desired(context.total_num_requests, caps, context.current_num_replicas, config.get_target_ongoing_requests())
    )
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return min(max(wanted, least), most), {}


def replicas(plan: Plan, kind: type = Replica) -> Application:
    """The replicas of a plan.

    Args:
        plan: what they run.
        kind: the class of a replica.
    """
    scaling = None
    if plan.max_replicas is not None:
        scaling = AutoscalingConfig(
            min_replicas=plan.replicas,
            max_replicas=plan.max_replicas,
            target_ongoing_requests=max(1.0, _BUSY * plan.engine.max_num_seqs),
            upscale_delay_s=10,
            downscale_delay_s=300,
            policy=AutoscalingPolicy(policy_function=f"{__name__}:scale"),
        )
    deployment = serve.deployment(
        kind,
        name="Replica",
        # an environment of its own would keep it from a Python that is there already
        ray_actor_options={"num_cpus": plan.num_cpus, "num_gpus": plan.num_gpus},
        max_ongoing_requests=plan.most_requests,
        max_constructor_retry_count=_MOST_STARTS,
        graceful_shutdown_timeout_s=plan.server.drain_seconds + 10,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=min(2.0, plan.stall_seconds / 4),
        health_check_timeout_s=max(5.0, plan.stall_seconds / 4),
        logging_config=_QUIET,
        request_router_config=RequestRouterConfig(
            request_router_class="flextron.replicas.router:Router",
            request_routing_stats_period_s=1.0,
            request_routing_stats_timeout_s=5.0,
        ),
        **({"num_replicas": plan.replicas} if scaling is None else {"autoscaling_config": scaling}),
    )
    return deployment.bind(plan)


def ingress_of(handle: DeploymentHandle, plan: Plan) -> Ingress:
    """An ingress in this process, for the replicas behind a handle."""
    give = handle.options(stream=True, method_name="answer").remote
    return Ingress(give, plan.server, _LOSSES, has_jobs=plan.state_directory is not None)


class _Forwarding(Response):
    """A response that is made while it is sent."""

    def __init__(self, ingress: Ingress) -> None:
        super().__init__()
        self._ingress = ingress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._ingress(scope, receive, send)


class IngressDeployment:
    """The ingress as a deployment, behind Ray's own HTTP proxies."""

    def __init__(self, handle: DeploymentHandle, plan: Plan) -> None:
        """Take the replicas."""
        self._ingress = ingress_of(handle, plan)

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        return _Forwarding(self._ingress)


def build(args: dict[str, Any]) -> Application:
    """The whole application, for `import_path: flextron.replicas.application:build`.

    Args:
        args: as docs/guides/replicas.md lists them.

    Raises:
        FlextronError: they do not fit.
    """
    plan = plan_of(args)
    ingress = serve.deployment(
        IngressDeployment,
        name="Ingress",
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=plan.server.drain_seconds + 10,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=_QUIET,
    )
    return ingress.bind(replicas(plan), plan)
