"""`/v1/files`: uploads of training data, and the results of jobs.

An upload goes to disk as it arrives and is never in memory as a whole. Its name is remembered, but no path is made of
anything that a client sends.
"""

from __future__ import annotations

import asyncio
import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from flextron.files import naming_a_full_disk
from flextron.finetuning.dataset import MOST_LINE_BYTES
from flextron.jobs.records import File
from flextron.jobs.uploads import FINE_TUNE, Uploads
from flextron.protocols.keys import unknown_key
from flextron.server.http import body_chunks
from flextron.server.multipart import Part, boundary_of, parse_parts
from flextron.server.openapi import error_responses
from flextron.server.paging import page_of, paged, parameters
from flextron.serving.errors import ApiError, bad_request, too_slow
from flextron.serving.settings import ServerSettings

__all__ = ["add_files"]

_FORM_BYTES = 65_536
"""The most bytes of a form apart from the file."""
_BYTES_PER_TIME = 10e6
"""For each portion of this many bytes the client gets as much time as for a request."""
_PIECE = 1 << 20
_MOST_LISTED = 10_000
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": FINE_TUNE}},
}
_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
_QUERY = parameters("purpose", "order", most=_MOST_LISTED)


def add_files(app: FastAPI, uploads: Uploads, settings: ServerSettings) -> None:
    """Add the paths to an application."""

    @app.post("/v1/files", responses=error_responses(400, 401, 403, 408, 413, 507), openapi_extra=_UPLOAD)
    async def upload_file(request: Request) -> JSONResponse:
        """Keep a file."""
        boundary = boundary_of(request.headers.get("content-type", ""))
        with naming_a_full_disk(uploads.spool), tempfile.TemporaryFile(dir=uploads.spool) as spool:
            await _receive(request, spool, settings)
            file = await asyncio.to_thread(_keep, uploads, spool, boundary, int(settings.max_file_mb * 1e6))
        return JSONResponse(_written(file))

    @app.get("/v1/files", responses=error_responses(400, 401, 404), openapi_extra=_QUERY)
    def list_files(request: Request) -> JSONResponse:
        """All files."""
        query = request.query_params
        page = page_of(request, default=_MOST_LISTED, most=_MOST_LISTED)
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise bad_request("order must be asc or desc", "order")
        files, has_more = uploads.page(purpose=query.get("purpose"), is_rising=order == "asc", **page)
        return paged([_written(file) for file in files], has_more)

    @app.get("/v1/files/{file_id}", responses=error_responses(401, 404))
    def get_file(file_id: str) -> JSONResponse:
        """What is known of a file."""
        return JSONResponse(_written(uploads.get(file_id)))

    content: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}

    @app.get("/v1/files/{file_id}/content", response_class=Response, responses=error_responses(401, 404) | content)
    def get_file_content(file_id: str) -> FileResponse:
        """What it holds."""
        name = uploads.get(file_id).filename
        return FileResponse(uploads.path(file_id), media_type="application/octet-stream", filename=name)

    @app.delete("/v1/files/{file_id}", responses=error_responses(400, 401, 403, 404, 507))
    def delete_file(file_id: str) -> JSONResponse:
        """Remove a file that no unfinished job needs."""
        uploads.delete(file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})


async def _receive(request: Request, spool: Any, settings: ServerSettings) -> None:
    """Write a body to disk as it comes."""
    max_bytes = int(settings.max_file_mb * 1e6) + _FORM_BYTES
    declared = request.headers.get("content-length", "")
    size = min(int(declared) if declared.isdecimal() else max_bytes, max_bytes)
    seconds = settings.client_seconds * (1 + size // _BYTES_PER_TIME)

    async def write() -> None:
        async for chunk in body_chunks(request, max_bytes):
            await asyncio.to_thread(spool.write, chunk)

    try:
        await asyncio.wait_for(write(), seconds)
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise too_slow(seconds) from error


def _keep(uploads: Uploads, spool: Any, boundary: bytes, max_bytes: int) -> File:
    """Keep the file that a form holds."""
    if spool.tell() == 0:
        raise bad_request("the body is empty; send a file")
    spool.flush()
    with mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ) as body:
        parts = {part.name: part for part in parse_parts(body, boundary)}
        if any(name.startswith("expires_after") for name in parts):
            raise bad_request("files do not expire here; leave expires_after out", "expires_after")
        purpose, file = parts.get("purpose"), parts.get("file")
        if purpose is None or body[purpose.start : purpose.end] != FINE_TUNE.encode():
            raise bad_request(f"purpose must be {FINE_TUNE!r}", "purpose")
        if file is None or file.filename is None:
            raise bad_request("the form has no file", "file")
        for name in parts.keys() - {"purpose", "file"}:
            raise unknown_key(name)
        if file.end - file.start > max_bytes:
            raise ApiError(413, f"the file is larger than {max_bytes} bytes", param="file", code="file_too_large")
        _check_lines(body, file)
        return uploads.add(file.filename, FINE_TUNE, _pieces(body, file))


def _check_lines(body: mmap.mmap, part: Part) -> None:
    """Refuse now what a job would refuse later."""
    at = part.start
    while part.end - at > MOST_LINE_BYTES:
        found = body.rfind(b"\n", at, at + MOST_LINE_BYTES)
        if found < 0:
            number = 1 + sum(piece.count(b"\n") for piece in _pieces(body, replace(part, end=at)))
            message = f"line {number} of the file is longer than {MOST_LINE_BYTES} bytes; make several examples of it"
            raise ApiError(400, message, param="file", code="line_too_long")
        at = found + 1


def _pieces(body: mmap.mmap, part: Part) -> Iterator[bytes]:
    for at in range(part.start, part.end, _PIECE):
        yield body[at : min(at + _PIECE, part.end)]


def _written(file: File) -> dict[str, Any]:
    """OpenAI's form."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
