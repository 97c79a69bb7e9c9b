"""`/openapi.json`: bodies and refusals, which the endpoints check and make themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

__all__ = ["describe", "error_responses"]

_REF = "#/components/schemas/{model}"


class ErrorFields(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """A refusal."""

    error: ErrorFields


_TOLD = {
    400: "The request cannot be answered as it is.",
    401: "The API key is missing or wrong.",
    403: "The host or the origin is not allowed.",
    404: "There is no such model, file or job.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not sent as JSON.",
    429: "The queue is full.",
    500: "The engine has stopped.",
    503: "The server is shutting down.",
    507: "The disk is full.",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Refusals with these statuses."""
    return {status: {"description": _TOLD[status], "model": ErrorBody} for status in statuses}


def describe(app: FastAPI, *bodies: type[BaseModel]) -> None:
    """Add the bodies' schemas to the application's document."""
    document = app.openapi()
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for body in bodies:
        schema = body.model_json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[body.__name__] = schema
