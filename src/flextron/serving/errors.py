"""Refusals in OpenAI's shape.

OpenAI's client repeats requests that were answered with 408, 409, 429 or 5xx. So only requests that may succeed later
get one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

__all__ = [
    "ApiError",
    "bad_request",
    "bad_value",
    "engine_died",
    "invalid_body",
    "not_found",
    "shutting_down",
    "too_slow",
]


class ApiError(Exception):
    """A request is refused, or has failed."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Say what is wrong.

        Args:
            status: status code of HTTP.
            message: one sentence that says what is wrong and how to mend it.
            kind: OpenAI's `type`.
            param: the key of the body that is meant.
            code: a word for programs.
            headers: headers of the answer.
        """
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON form."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None) -> ApiError:
    """400: the same request will never be answered."""
    return ApiError(400, message, param=param)


def bad_value(message: str, param: str) -> ApiError:
    """400: a key has a value that does not go, by itself or beside others."""
    return ApiError(400, message, param=param, code="invalid_value")


def not_found(model_id: str, message: str | None = None) -> ApiError:
    """404: no such model."""
    said = message or f"there is no model {model_id[:200]!r}; GET /v1/models lists them"
    return ApiError(404, said, param="model", code="model_not_found")


def too_slow(seconds: float) -> ApiError:
    """408: the request did not arrive in time."""
    message = f"the request did not arrive within {seconds:g} s"
    return ApiError(408, message, code="request_timeout", headers={"connection": "close"})


def shutting_down() -> ApiError:
    """503: ask again elsewhere, or later."""
    headers = {"retry-after": "5"}
    return ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down", headers=headers)


def engine_died() -> ApiError:
    """500: the log says why."""
    return ApiError(500, "the engine has stopped because of an error; see the log", kind="server_error")


def invalid_body(error: ValidationError) -> ApiError:
    """400: the first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # pydantic adds the branches of unions, which are no keys: `str`, `list[int]`, `constrained-int`
    keys = [str(key) for key in first["loc"] if isinstance(key, int) or (key.islower() and key.isidentifier())]
    keys = [key for key in keys if key not in ("str", "int", "float", "bool")]
    param = ".".join(keys) or None
    message = first["msg"].removeprefix("Value error, ")
    code = _CODES.get(first["type"], "invalid_type" if first["type"].endswith("_type") else "invalid_value")
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code=code)


_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
"""OpenAI's codes by pydantic's kinds of errors."""
