"""The web application: what each path does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, cast

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flextron.api import ElasticModel
from flextron.dialects.messages import count_tokens, messages
from flextron.dialects.messages_body import CountBody, MessagesBody
from flextron.dialects.responses import input_tokens, responses
from flextron.dialects.responses_body import ResponsesBody
from flextron.engine import EngineSettings
from flextron.errors import FlextronError, LongPromptError, PromptError
from flextron.files import NoSpaceError
from flextron.jobs.database import UnknownIdError
from flextron.jobs.jobs import Jobs
from flextron.protocols.bodies import ChatBody, CompletionBody
from flextron.protocols.chat import chat
from flextron.protocols.completions import completions
from flextron.protocols.embeddings import EmbeddingBody, embeddings
from flextron.protocols.sampling import RequestBody
from flextron.protocols.tokenizing import DetokenizeBody, TokenizeBody, detokenize, tokenize
from flextron.server.files import add_files
from flextron.server.finetuning import FineTuningBody, add_finetuning
from flextron.server.http import RequestMiddleware, answer_error, read_body
from flextron.server.information import add_health, add_models, add_tokenizer
from flextron.server.openapi import describe, error_responses
from flextron.server.page.routes import add_page, open_paths
from flextron.serving.adapters import AdapterNames
from flextron.serving.errors import ApiError, bad_request
from flextron.serving.service import Service
from flextron.serving.settings import ServerSettings

__all__ = ["app_of", "create_app"]

_ANSWERS: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}


def create_app(
    model: ElasticModel,
    settings: ServerSettings | None = None,
    engine: EngineSettings | None = None,
    jobs: Jobs | None = None,
    adapters: AdapterNames | None = None,
) -> FastAPI:
    """An ASGI application that serves a model; `app.state.service` is what runs behind it.

    Args:
        model: an elastic model, which must not change while it is served.
        settings: limits of the server.
        engine: sizes of the engine.
        jobs: finetuning, if it is offered. Its trainers (`Trainer`) take steps in units between engine iterations.
            The caller closes it when the application has ended.
        adapters: the adapters that requests may name; `jobs` should tell it of those that it makes.

    Raises:
        FlextronError: the model has no tokenizer, or its name does not fit.
    """
    service = Service(model, settings or ServerSettings(), engine or EngineSettings(), adapters, jobs)
    return app_of(model, service, jobs)


def app_of(model: ElasticModel, service: Service, jobs: Jobs | None = None) -> FastAPI:
    """An application in front of a service; it starts and stops it by ASGI's lifespan.

    Args:
        model: what the service serves.
        service: what runs behind it.
        jobs: finetuning, if it is offered.
    """
    settings = service.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="flextron",
        version=version("flextron"),
        lifespan=lifespan,
        # the pages would load their scripts from elsewhere; /openapi.json is enough
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=_HANDLERS,
    )
    app.state.service = service
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(
        RequestMiddleware,
        api_key=settings.api_key,
        allowed_hosts=settings.allowed_hosts,
        allowed_origins=settings.allowed_origins,
        open_paths=open_paths() if settings.page else (),
    )
    add_models(app, service)
    _add_endpoint(app, service, "/v1/completions", CompletionBody, completions)
    _add_endpoint(app, service, "/v1/chat/completions", ChatBody, chat)
    _add_endpoint(app, service, "/v1/responses", ResponsesBody, responses)
    _add_endpoint(app, service, "/v1/responses/input_tokens", ResponsesBody, input_tokens)
    _add_endpoint(app, service, "/v1/messages", MessagesBody, messages)
    _add_endpoint(app, service, "/v1/messages/count_tokens", CountBody, count_tokens)
    _add_endpoint(app, service, "/v1/embeddings", EmbeddingBody, embeddings)
    _add_endpoint(app, service, "/tokenize", TokenizeBody, tokenize)
    _add_endpoint(app, service, "/detokenize", DetokenizeBody, detokenize)
    add_tokenizer(app, service)
    add_health(app, service)
    bodies: list[type[BaseModel]] = [
        CompletionBody,
        ChatBody,
        ResponsesBody,
        MessagesBody,
        CountBody,
        EmbeddingBody,
        TokenizeBody,
        DetokenizeBody,
    ]
    if jobs is not None:
        add_files(app, jobs.uploads, settings)
        add_finetuning(app, jobs, service.catalog, settings)
        _add_deletion(app, service, jobs)
        bodies.append(FineTuningBody)
    if settings.page:
        add_page(app, model, service, jobs)
    describe(app, *bodies)
    return app


def _add_deletion(app: FastAPI, service: Service, jobs: Jobs) -> None:
    """`DELETE /v1/models/{id}`, for what jobs made."""

    @app.delete("/v1/models/{model_id:path}", responses=error_responses(400, 401, 403, 404, 507))
    async def delete_model(model_id: str) -> JSONResponse:
        """Remove a finetuned model; requests that run in it end as usual."""
        try:
            await asyncio.to_thread(jobs.delete_adapter, model_id)
        except UnknownIdError as error:
            service.catalog.choose(model_id)
            raise bad_request(f"{model_id!r} is not a finetuned model, so it cannot be deleted", "model") from error
        service.adapters.tidy()
        return JSONResponse({"id": model_id, "object": "model", "deleted": True})


def _add_endpoint(
    app: FastAPI,
    service: Service,
    path: str,
    kind: type[RequestBody],
    answer: Callable[[Request, Service, Any], Awaitable[Response]],
) -> None:
    """A path that takes a JSON body; FastAPI's own reading would answer in its own shape."""
    max_bytes, seconds = int(service.settings.max_body_mb * 1e6), service.settings.client_seconds
    schema = {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
    body = {"requestBody": {"required": True, "content": {"application/json": schema}}}

    async def endpoint(request: Request) -> Response:
        asked = await read_body(request, kind, max_bytes, seconds)
        try:
            return await answer(request, service, asked)
        except PromptError as error:
            code = "context_length_exceeded" if isinstance(error, LongPromptError) else None
            raise ApiError(400, str(error), param=asked.prompt_key, code=code) from error

    app.post(
        path,
        name=answer.__name__,
        summary=(answer.__doc__ or "").splitlines()[0],
        response_class=Response,
        responses=error_responses(400, 401, 403, 404, 408, 413, 415, 429, 500, 503) | {200: {"content": _ANSWERS}},
        openapi_extra=body,
    )(endpoint)


def _from_api(request: Request, error: Exception) -> Response:
    return answer_error(cast(ApiError, error), request.url.path)


def _from_input(request: Request, error: Exception) -> Response:
    """Answer an error that the model, the engine or a check below raised."""
    return answer_error(bad_request(str(error)), request.url.path)


def _from_id(request: Request, error: Exception) -> Response:
    return answer_error(ApiError(404, str(error), code="not_found"), request.url.path)


def _from_disk(request: Request, error: Exception) -> Response:
    return answer_error(ApiError(507, str(error), kind="server_error", code="no_space"), request.url.path)


def _from_http(request: Request, error: Exception) -> Response:
    """No such path, or no such method there."""
    refused = cast(HTTPException, error)
    told = {404: f"there is no {request.url.path[:200]!r}", 405: f"{request.method} is not possible here"}
    message = told.get(refused.status_code, str(refused.detail))
    return answer_error(ApiError(refused.status_code, message, headers=refused.headers), request.url.path)


_HANDLERS: dict[int | type[Exception], Any] = {
    ApiError: _from_api,
    FlextronError: _from_input,
    UnknownIdError: _from_id,
    NoSpaceError: _from_disk,
    HTTPException: _from_http,
}
