"""What the tables hold, as values."""

from __future__ import annotations

import json
import secrets
import sqlite3
from dataclasses import dataclass
from enum import Enum
from typing import Any

from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.spec import SubnetSpec

__all__ = ["ALIVE", "ENDED", "File", "Job", "JobCheckpoint", "JobError", "JobEvent", "Status", "new_id"]

_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz23456789"


def new_id(kind: str) -> str:
    """An id that nobody guesses, such as `ftjob-8mEt…`; letters and digits only after the kind."""
    return f"{kind}-" + "".join(secrets.choice(_LETTERS) for _ in range(24))


class Status(str, Enum):
    """Status of a job."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ALIVE = (Status.VALIDATING, Status.QUEUED, Status.RUNNING)
"""Jobs that go on by themselves."""
ENDED = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)
"""Nothing follows these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """An uploaded or a result file."""

    id: str
    created_at: int
    """Unix time, as all times here."""
    bytes: int
    filename: str
    """The client's name for the file; never a path of ours."""
    purpose: str

    @classmethod
    def of(cls, row: sqlite3.Row) -> File:
        """Read from its row."""
        return cls(**{key: row[key] for key in ("id", "created_at", "bytes", "filename", "purpose")})


@dataclass(frozen=True, kw_only=True, slots=True)
class JobError:
    """Why a job failed."""

    message: str
    code: str
    param: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A finetuning job."""

    id: str
    created_at: int
    finished_at: int | None
    status: Status
    model: str
    """The base model's name."""
    suffix: str | None
    fine_tuned_model: str | None
    """The name of what came out, once it succeeded."""
    training_file: str
    validation_file: str | None
    hyperparameters: Hyperparameters
    seed: int
    metadata: dict[str, str]
    error: JobError | None
    result_file: str | None
    spec: SubnetSpec | None = None
    """The sub-network that is trained in; None for the full one."""

    @classmethod
    def of(cls, row: sqlite3.Row) -> Job:
        """Read from its row."""
        plain = ("id", "created_at", "finished_at", "model", "suffix", "fine_tuned_model", "seed", "result_file")
        return cls(
            **{key: row[key] for key in (*plain, "training_file", "validation_file")},
            status=Status(row["status"]),
            hyperparameters=Hyperparameters.from_dict(json.loads(row["hyperparameters"])),
            metadata=json.loads(row["metadata"]),
            error=None if row["error"] is None else JobError(**json.loads(row["error"])),
            spec=None if row["spec"] is None else SubnetSpec.from_dict(json.loads(row["spec"])),
        )

    def name(self, step: int | None = None) -> str:
        """Name of the finished adapter, or of the one after a step."""
        name = f"ft:{self.model}:flextron:{self.suffix or ''}:{self.id[-8:]}"
        return name if step is None else f"{name}:ckpt-step-{step}"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEvent:
    """Something that happened to a job."""

    id: str
    created_at: int
    level: str
    type: str
    message: str
    data: dict[str, Any]

    @classmethod
    def of(cls, row: sqlite3.Row) -> JobEvent:
        """From its row."""
        plain = {key: row[key] for key in ("id", "created_at", "level", "type", "message")}
        return cls(**plain, data=json.loads(row["data"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class JobCheckpoint:
    """An adapter, finished or not, that can be served."""

    id: str
    created_at: int
    job_id: str
    step: int
    name: str
    loss: float
    accuracy: float | None
    valid_loss: float | None = None
    valid_accuracy: float | None = None

    @classmethod
    def of(cls, row: sqlite3.Row) -> JobCheckpoint:
        """Read from its row."""
        return cls(**{key: row[key] for key in cls.__slots__})
