"""`/v1/completions`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from flextron.engine.output import Delta
from flextron.server.bodies import CompletionBody
from flextron.server.responses import respond
from flextron.serving.service import Service

__all__ = ["completions"]

_LEAST_LOGPROB = -9999.0
_DEFAULT_TOKENS = 16


async def completions(request: Request, service: Service, body: CompletionBody) -> Response:
    """Continue prompts.

    Raises:
        ApiError: the request cannot be answered.
    """
    choice = service.choose(body.model, body.flextron)
    service.check(len(body.prompts) * body.num_choices, body.max_tokens)
    special = body.add_special_tokens is not False
    prompts = [await service.encode(p, add_special_tokens=special) if isinstance(p, str) else p for p in body.prompts]
    most = [body.max_tokens or min(_DEFAULT_TOKENS, service.room(len(p), choice)) for p in prompts]
    form = _CompletionForm(service, body)
    return await respond(request, service, body, choice, prompts, most, form)


class _CompletionForm:
    """OpenAI's words for continued texts."""

    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, body: CompletionBody) -> None:
        """Answer a request."""
        self._service, self._body = service, body

    def whole(self, index: int, piece: Delta) -> dict[str, Any]:
        """With the prompt, if it is echoed."""
        return self._choice(index, self._echo(index) + piece.text, piece)

    def opening(self, index: int) -> dict[str, Any] | None:
        """The prompt, if it is echoed."""
        return self._choice(index, self._echo(index), Delta()) if self._body.echo else None

    def part(self, index: int, piece: Delta) -> list[dict[str, Any]]:
        """One entry."""
        return [self._choice(index, piece.text, piece)]

    def _echo(self, index: int) -> str:
        """What the answer begins with."""
        if not self._body.echo:
            return ""
        prompt = self._body.prompts[index // self._body.num_choices]
        # only now, as the engine has found all ids in the vocabulary
        return prompt if isinstance(prompt, str) else str(self._service.tokenizer.decode(prompt))

    def _choice(self, index: int, text: str, piece: Delta) -> dict[str, Any]:
        reason = None if piece.finish_reason is None else piece.finish_reason.value
        logprobs = None if self._body.logprobs is None else self._logprobs(piece)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, piece: Delta) -> dict[str, Any]:
        key = self._service.names.key
        return {
            "tokens": [key(token) for token in piece.token_ids],
            "token_logprobs": [max(p.chosen, _LEAST_LOGPROB) for p in piece.logprobs],
            "top_logprobs": [{key(t): max(value, _LEAST_LOGPROB) for t, value in p.top} for p in piece.logprobs],
            "text_offset": piece.offsets,
        }
