"""The page's paths: its files, which need no key, and two sources of figures, which do."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from flextron.api import ElasticModel
from flextron.jobs.jobs import Jobs
from flextron.server.page.facts import facts
from flextron.server.page.files import PREFIX, Asset, assets
from flextron.server.page.live import Live
from flextron.serving.errors import ApiError
from flextron.serving.service import Service

__all__ = ["add_page", "open_paths"]

_HEADERS = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    # it may be kept, but is asked for again: after an update all files are of one version
    "cache-control": "no-cache",
}


def open_paths() -> frozenset[str]:
    """Paths that need no key: the page asks for it."""
    return frozenset(assets())


def add_page(app: FastAPI, model: ElasticModel, service: Service, jobs: Jobs | None) -> None:
    """Add the paths to an application; they are not a part of its described interface."""
    live = Live(service)
    app.state.live = live

    def add(path: str, asset: Asset) -> None:
        headers = {**_HEADERS, "etag": asset.etag}

        @app.get(path, include_in_schema=False)
        async def get_asset(request: Request) -> Response:
            if request.headers.get("if-none-match") == asset.etag:
                return Response(status_code=304, headers=headers)
            return Response(asset.content, media_type=asset.media_type, headers=headers)

    for path, asset in assets().items():
        add(path, asset)

    @app.get(PREFIX + "facts", include_in_schema=False)
    def get_facts() -> JSONResponse:
        return JSONResponse(facts(model, service, jobs))

    @app.post(PREFIX + "measure", include_in_schema=False)
    async def measure(request: Request) -> JSONResponse:
        # of a page elsewhere, browsers send this kind only after asking, and nobody answers them
        if request.headers.get("content-type") != "application/json":
            raise ApiError(415, "the body must be application/json")
        await service.measure()
        return JSONResponse(facts(model, service, jobs))

    @app.get(PREFIX + "live", include_in_schema=False)
    async def get_live() -> Response:
        headers = {"cache-control": "no-cache"}
        return StreamingResponse(live.events(), media_type="text/event-stream", headers=headers)
