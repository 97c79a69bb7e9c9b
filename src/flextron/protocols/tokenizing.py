"""The tokenizer over HTTP, as vLLM has it: `/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flextron.protocols.bodies import Message
from flextron.protocols.chat import rendered
from flextron.protocols.messages import check_messages
from flextron.protocols.sampling import RequestBody
from flextron.serving.errors import bad_request, bad_value
from flextron.serving.service import Service

__all__ = ["DetokenizeBody", "TokenizeBody", "detokenize", "tokenize"]


class TokenizeBody(RequestBody):
    """Body of `/tokenize`: a text, or a conversation."""

    prompt_key = "prompt"

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1), BeforeValidator(check_messages)] | None = None
    add_special_tokens: bool | None = None
    """Whether a text begins as the tokenizer begins it (by default), or a conversation (by default not)."""
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise bad_value("give prompt or messages, one of them", "prompt")
        return self


class DetokenizeBody(RequestBody):
    """Body of `/detokenize`."""

    prompt_key = "tokens"

    model: str | None = None
    tokens: list[int]


async def tokenize(request: Request, service: Service, body: TokenizeBody) -> Response:
    """Token ids of a text or a conversation.

    Raises:
        ApiError: the model is unknown, or the text is too long.
    """
    _check_model(service, body.model)
    messages = body.messages
    if messages is None:
        special, text = body.add_special_tokens is not False, body.prompt or ""
        tokens = await service.prompts.encode(text, add_special_tokens=special)
    else:
        opens = body.add_generation_prompt is not False
        tokens = await service.prompts.encode(
            lambda: rendered(service, messages, add_generation_prompt=opens),
            add_special_tokens=bool(body.add_special_tokens),
        )
    report: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": _positions(service)}
    pieces = service.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
    return JSONResponse(report | {"token_strs": pieces})


async def detokenize(request: Request, service: Service, body: DetokenizeBody) -> Response:
    """The text of token ids, special tokens included.

    Raises:
        ApiError: the model is unknown, or does not have a token.
    """
    _check_model(service, body.model)
    if not all(0 <= token < len(service.tokenizer) for token in body.tokens):
        raise bad_request(f"there are tokens outside the vocabulary of {len(service.tokenizer)}", "tokens")
    return JSONResponse({"prompt": str(service.tokenizer.decode(body.tokens))})


def _check_model(service: Service, model_id: str | None) -> None:
    if model_id is not None:
        service.choose(model_id, None)


def _positions(service: Service) -> int:
    return service.core.decoder.config.max_position_embeddings
