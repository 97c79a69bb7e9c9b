"""`/v1/fine_tuning/jobs`, as OpenAI has them, and what their client does not know of: more hyperparameters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse

from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.jobs.jobs import Jobs
from flextron.jobs.records import Job, JobCheckpoint, JobEvent
from flextron.protocols.keys import unknown_key, unsupported
from flextron.server.http import read_body
from flextron.server.openapi import error_responses
from flextron.server.paging import page_of, paged, parameters
from flextron.serving.errors import bad_request, not_found
from flextron.serving.settings import ServerSettings
from flextron.serving.targets import Catalog, TargetBody

__all__ = ["FineTuningBody", "add_finetuning"]

_PATH = "/v1/fine_tuning/jobs"
_DEFAULT_LISTED, _MOST_LISTED = 20, 100
_SCHEMA = {"schema": {"$ref": "#/components/schemas/FineTuningBody"}}
_BODY = {"requestBody": {"required": True, "content": {"application/json": _SCHEMA}}}
_QUERY = parameters(most=_MOST_LISTED)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


class SupervisedBody(_Strict):
    """Settings of the method `supervised`."""

    hyperparameters: dict[str, Any] | None = None


class MethodBody(_Strict):
    """How it is trained."""

    type: Literal["supervised"]
    supervised: SupervisedBody | None = None


class FineTuningBody(_Strict):
    """Body that creates a job."""

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: dict[str, Any] | None = None
    method: MethodBody | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    flextron: TargetBody | None = None
    """The target whose sub-network is trained in; `model@0.6` names one, too. By default the full network."""
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("integrations") not in (None, []):
            raise unsupported("integrations")
        for name in data.keys() - cls.model_fields.keys() - {"integrations"}:
            raise unknown_key(name)
        return {name: value for name, value in data.items() if name != "integrations"}

    @property
    def chosen(self) -> dict[str, Any]:
        """Hyperparameters from the place where they are, or the older one.

        Raises:
            ApiError: both places differ.
        """
        method = self.method.supervised if self.method is not None else None
        new, old = None if method is None else method.hyperparameters, self.hyperparameters
        if new is not None and old is not None and new != old:
            raise bad_request("method and hyperparameters differ; give one of them", "hyperparameters")
        return new or old or {}


def add_finetuning(app: FastAPI, jobs: Jobs, catalog: Catalog, settings: ServerSettings) -> None:
    """Add the paths to an application."""
    max_bytes, seconds = int(settings.max_body_mb * 1e6), settings.client_seconds

    @app.post(_PATH, responses=error_responses(400, 401, 403, 404, 408, 413, 415, 507), openapi_extra=_BODY)
    async def create_fine_tuning_job(request: Request) -> JSONResponse:
        """Begin a job."""
        body = await read_body(request, FineTuningBody, max_bytes, seconds)
        return JSONResponse(await asyncio.to_thread(_create, jobs, catalog, body))

    @app.get(_PATH, responses=error_responses(400, 401, 404), openapi_extra=_QUERY)
    def list_fine_tuning_jobs(request: Request) -> JSONResponse:
        """All jobs, newest first."""
        if any(key.startswith("metadata") for key in request.query_params):
            raise bad_request("jobs cannot be searched by metadata; leave it out", "metadata")
        found, has_more = jobs.page(**_page(request))
        return paged([_written(jobs, job) for job in found], has_more)

    @app.get(_PATH + "/{job_id}", responses=error_responses(401, 404))
    def get_fine_tuning_job(job_id: str) -> JSONResponse:
        """How a job stands."""
        return JSONResponse(_written(jobs, jobs.get(job_id)))

    def add_change(name: str, change: Callable[[str], Job]) -> None:
        @app.post(
            f"{_PATH}/{{job_id}}/{name}",
            name=f"{name}_fine_tuning_job",
            summary=(change.__doc__ or "").split(";")[0],
            responses=error_responses(400, 401, 403, 404, 507),
        )
        def change_fine_tuning_job(job_id: str) -> JSONResponse:
            return JSONResponse(_written(jobs, change(job_id)))

    for name, change in (("cancel", jobs.cancel), ("pause", jobs.pause), ("resume", jobs.resume)):
        add_change(name, change)

    @app.get(_PATH + "/{job_id}/events", responses=error_responses(400, 401, 404), openapi_extra=_QUERY)
    def list_fine_tuning_events(job_id: str, request: Request) -> JSONResponse:
        """What happened to a job, newest first."""
        events, has_more = jobs.repository.events(job_id, **_page(request))
        return paged([_event(event) for event in events], has_more)

    @app.get(_PATH + "/{job_id}/checkpoints", responses=error_responses(400, 401, 404), openapi_extra=_QUERY)
    def list_fine_tuning_checkpoints(job_id: str, request: Request) -> JSONResponse:
        """Adapters of a job, newest first."""
        checkpoints, has_more = jobs.checkpoints(job_id, **_page(request))
        return paged([_checkpoint(checkpoint) for checkpoint in checkpoints], has_more)


def _page(request: Request) -> Any:
    return page_of(request, default=_DEFAULT_LISTED, most=_MOST_LISTED)


def _create(jobs: Jobs, catalog: Catalog, body: FineTuningBody) -> dict[str, Any]:
    if body.model.partition("@")[0] != jobs.model:
        raise not_found(body.model, f"there is no model {body.model[:200]!r} to finetune; use {jobs.model!r}")
    if body.flextron is not None and (body.flextron.router or body.flextron.min_latency_target is not None):
        raise bad_request("a job trains in one sub-network; leave router and min_latency_target out", "flextron")
    choice = catalog.choose(body.model, body.flextron)
    job = jobs.create(
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        hyperparameters=Hyperparameters.from_dict(body.chosen),
        seed=body.seed,
        metadata=body.metadata,
        spec=None if choice.target is None else choice.spec,
    )
    return _written(jobs, job)


def _written(jobs: Jobs, job: Job) -> dict[str, Any]:
    """OpenAI's form."""
    hyperparameters = job.hyperparameters.to_dict()
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": "flextron",
        "status": job.status.value,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": [] if job.result_file is None else [job.result_file],
        "trained_tokens": jobs.repository.trained_tokens(job.id),
        "error": None if job.error is None else asdict(job.error),
        "seed": job.seed,
        "estimated_finish": jobs.scheduler.estimated_finish(job.id),
        "integrations": [],
        "flextron": {"spec": None if job.spec is None else job.spec.to_dict()},
        "metadata": job.metadata,
        "user_provided_suffix": job.suffix,
    }


def _event(event: JobEvent) -> dict[str, Any]:
    return {"object": "fine_tuning.job.event", **asdict(event)}


def _checkpoint(checkpoint: JobCheckpoint) -> dict[str, Any]:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": {
            "step": checkpoint.step,
            "train_loss": checkpoint.loss,
            "train_mean_token_accuracy": checkpoint.accuracy,
            "valid_loss": checkpoint.valid_loss,
            "valid_mean_token_accuracy": checkpoint.valid_accuracy,
            "full_valid_loss": checkpoint.valid_loss,
            "full_valid_mean_token_accuracy": checkpoint.valid_accuracy,
        },
    }
