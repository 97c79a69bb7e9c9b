"""What each replica runs: plain values that travel to its process, and the model and service that it makes of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from flextron import api
from flextron.api import ElasticModel
from flextron.api.engine import speculation_of
from flextron.engine import EngineSettings
from flextron.errors import FlextronError
from flextron.files import checked
from flextron.jobs.jobs import JobsSettings
from flextron.kernels.decoder import Weights
from flextron.routing.device import Precision
from flextron.serving.settings import ServerSettings

__all__ = ["Plan", "plan_of"]

_KEY = "FLEXTRON_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model and how it is served; equal on all replicas."""

    directory: str
    """Elastic checkpoint, on a path that is the same on every node."""
    server: ServerSettings = field(default_factory=ServerSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    device: str | None = None
    """Device of a replica; by default a GPU, if it has one."""
    dtype: Precision = "float32"
    speculate: Weights | None = None
    """Precision of drafts; None for no speculation."""
    adapters: tuple[str, ...] = ()
    """`NAME=DIRECTORY` each."""
    state_directory: str | None = None
    """Finetuning jobs, files and adapters, in a directory that all nodes share; None for no finetuning."""
    jobs: JobsSettings = field(default_factory=JobsSettings)
    replicas: int = 2
    max_replicas: int | None = None
    """Up to so many while there is load; by default always `replicas`."""
    num_cpus: int = 1
    """Cores that a replica reserves, and its threads; OMP_NUM_THREADS, where it is set, is the threads alone."""
    num_gpus: float = 0.0
    """GPUs that a replica reserves."""
    stall_seconds: float = 20.0
    """An engine that has work and takes no step for so long is hung; its replica is replaced."""
    revision: str = ""
    """Anything; another one loads the model anew."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.replicas < 1:
            raise FlextronError(f"the number of replicas must be at least 1, not {self.replicas}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise FlextronError(f"max_replicas is {self.max_replicas}, but there are {self.replicas} to begin with")
        if self.engine.tensor_parallel > 1:
            raise FlextronError("each replica runs on one device; leave tensor_parallel out, or serve without replicas")
        if self.num_cpus < 1 or self.num_gpus < 0 or not 0 < self.stall_seconds < float("inf"):
            raise FlextronError("num_cpus must be at least 1, num_gpus at least 0, and stall_seconds a number above 0")

    @property
    def most_requests(self) -> int:
        """More than a replica takes at once: it refuses the rest itself, as a server alone does."""
        return 2 * (self.engine.max_num_seqs + self.server.max_queue) + 64

    def load(self) -> tuple[ElasticModel, EngineSettings]:
        """The model, and the engine's sizes and drafts.

        Raises:
            FlextronError: as for `load`.
        """
        model = api.load(self.directory, device=self.device, dtype=self.dtype)
        speculation = None if self.speculate is None else speculation_of(model, self.speculate)
        return model, replace(self.engine, speculation=speculation)


class _Written(BaseModel):
    """A plan in a file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    server: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    device: str | None = None
    dtype: Precision = "float32"
    speculate: Weights | None = None
    adapters: list[str] = []
    state_directory: str | None = None
    max_training: int = 8
    replicas: int = 2
    max_replicas: int | None = None
    num_cpus: int = 1
    num_gpus: float = 0.0
    stall_seconds: float = 20.0
    revision: str = ""


def plan_of(args: Any) -> Plan:
    """A plan out of the arguments of a Serve configuration; the key comes from FLEXTRON_API_KEY, never from a file.

    Raises:
        FlextronError: a key is unknown, or a value does not fit.
    """
    what, remedy = "the application's args", "see docs/guides/replicas.md"
    given = checked(_Written, args, what, remedy)
    fields = given.model_dump(exclude={"model", "server", "engine", "adapters", "max_training"})
    if "api_key" in given.server:
        raise FlextronError(f"the API key does not belong into a file; set {_KEY} in the containers' environment")
    name = Path(given.model).expanduser().resolve().name
    # any host: requests come through Ray's proxy and a load balancer
    server = {"name": name, "api_key": os.environ.get(_KEY), "allowed_hosts": None} | given.server
    for key in ("allowed_hosts", "allowed_origins"):
        if isinstance(server.get(key), list):
            server[key] = tuple(server[key])
    try:
        return Plan(
            directory=given.model,
            server=ServerSettings(**server),
            engine=EngineSettings(**given.engine),
            adapters=tuple(given.adapters),
            jobs=JobsSettings(max_training=given.max_training),
            **fields,
        )
    except TypeError as error:
        raise FlextronError(f"{what} do not fit ({error}); {remedy}") from error
