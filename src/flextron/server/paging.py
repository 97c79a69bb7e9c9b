"""Lists that are read page by page: `after` and `limit` in the query, `has_more` in the answer."""

from __future__ import annotations

from typing import Any, TypedDict

from starlette.requests import Request
from starlette.responses import JSONResponse

from flextron.serving.errors import bad_request

__all__ = ["Page", "page_of", "paged", "parameters"]


class Page(TypedDict):
    """Which page is asked for."""

    after: str | None
    """Id of the last entry of the page before."""
    limit: int


def page_of(request: Request, *, default: int, most: int) -> Page:
    """The page that a request asks for.

    Raises:
        ApiError: the limit is no number from 1 to `most`.
    """
    asked = request.query_params.get("limit", str(default))
    limit = int(asked) if asked.isascii() and asked.isdecimal() and len(asked) < 10 else 0
    if not 1 <= limit <= most:
        raise bad_request(f"limit must be a whole number from 1 to {most}", "limit")
    return Page(after=request.query_params.get("after"), limit=limit)


def paged(entries: list[dict[str, Any]], has_more: bool) -> JSONResponse:
    """A page in OpenAI's form."""
    ends = {"first_id": entries[0]["id"] if entries else None, "last_id": entries[-1]["id"] if entries else None}
    return JSONResponse({"object": "list", "data": entries, "has_more": has_more, **ends})


def parameters(*others: str, most: int) -> dict[str, Any]:
    """The query in `/openapi.json`, with texts beside the page."""
    limit = {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": most}}
    texts = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in ("after", *others)]
    return {"parameters": [*texts, limit]}
