"""Paths that only tell: models, health, metrics, the tokenizer, the version."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse, PlainTextResponse, Response

from flextron.server.openapi import error_responses
from flextron.serving.errors import ApiError, not_found
from flextron.serving.service import Service

__all__ = ["add_health", "add_models", "add_tokenizer"]


def add_models(app: FastAPI, service: Service) -> None:
    """`/v1/models`: the name, and names of sub-networks and adapters."""

    def card(model_id: str) -> dict[str, Any]:
        choice = service.catalog.choose(model_id)
        name = service.catalog.name
        return {
            "id": model_id,
            "object": "model",
            "created": service.started_at if choice.adapter is None else choice.adapter.created_at,
            "owned_by": "flextron",
            "parent": None if model_id == name else name,
            "max_model_len": service.core.decoder.config.max_position_embeddings,
            "flextron": choice.report(),
        }

    @app.get("/v1/models", responses=error_responses(401))
    async def list_models() -> JSONResponse:
        catalog = service.catalog
        found = [card(model_id) for model_id in catalog.ids()]
        for adapter in catalog.adapters():
            with suppress(ApiError):  # just deleted
                found.append(card(adapter.name))
        return JSONResponse({"object": "list", "data": found})

    @app.get("/v1/models/{model_id:path}", responses=error_responses(401, 404))
    async def get_model(model_id: str) -> JSONResponse:
        try:
            return JSONResponse(card(model_id))
        except ApiError as error:
            raise not_found(model_id, error.message) from error


def add_health(app: FastAPI, service: Service) -> None:
    """`/health` and `/metrics`, which never ask for a key."""

    @app.get("/health", responses=error_responses(503))
    async def health() -> JSONResponse:
        if not service.is_healthy:
            message = "the server is shutting down" if service.is_draining else "the engine has stopped"
            raise ApiError(503, message, kind="server_error")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def add_tokenizer(app: FastAPI, service: Service) -> None:
    """Paths of vLLM: `/tokenizer_info`, `/version`, `/ping`."""

    @app.get("/tokenizer_info", responses=error_responses(401))
    async def tokenizer_info() -> JSONResponse:
        tokenizer = service.tokenizer
        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": len(tokenizer),
                "model_max_length": service.core.decoder.config.max_position_embeddings,
                "chat_template": tokenizer.chat_template,
                **{name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
                "eos_token": tokenizer.eos_token,
                "bos_token": tokenizer.bos_token,
            }
        )

    @app.get("/version")
    async def show_version() -> JSONResponse:
        return JSONResponse({"version": version("flextron")})

    @app.get("/ping")
    async def ping() -> JSONResponse:
        return JSONResponse({})
