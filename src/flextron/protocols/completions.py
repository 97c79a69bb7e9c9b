"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from flextron.engine import Logprobs
from flextron.engine.output import Delta
from flextron.generation.detokenize import Detokenizer
from flextron.protocols.bodies import CompletionBody
from flextron.protocols.responses import prompt_report, respond, stop_report, token_report
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
    prompts = [
        await service.prompts.encode(p, add_special_tokens=special) if isinstance(p, str) else p for p in body.prompts
    ]
    most = [
        min(_DEFAULT_TOKENS, service.room(len(p), choice)) if body.max_tokens is None else body.max_tokens
        for p in prompts
    ]
    return await respond(request, service, body, choice, prompts, most, _CompletionForm(service, body, prompts))


class _CompletionForm:
    """OpenAI's words for continued texts."""

    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, body: CompletionBody, prompts: Sequence[list[int]]) -> None:
        """Take the prompts, with which answers may begin."""
        self._names, self._tokenizer, self._body, self._prompts = service.names, service.tokenizer, body, prompts
        self._has_logprobs, self._ends = body.logprobs is not None, service.defaults.ends

    def report(self, pieces: Sequence[Delta]) -> dict[str, Any]:
        """Nothing stands beside the choices."""
        return {}

    def whole(self, index: int, piece: Delta) -> dict[str, Any]:
        """With the prompt, if it is echoed."""
        return self._choice(index, piece, is_first=True)

    def opening(self, index: int) -> dict[str, Any] | None:
        """The prompt, if it is echoed; with its log-probabilities it waits for them."""
        if self._body.echo and not self._has_logprobs:
            return self._choice(index, Delta(), is_first=True)
        return None

    def part(self, index: int, piece: Delta) -> list[dict[str, Any]]:
        """One entry."""
        return [self._choice(index, piece, is_first=piece.prompt_logprobs is not None)]

    def _echo(self, number: int) -> str:
        """What the answers to a prompt begin with."""
        if not self._body.echo:
            return ""
        prompt = self._body.prompts[number]
        # only now, as the engine has found all ids in the vocabulary
        return prompt if isinstance(prompt, str) else str(self._tokenizer.decode(prompt))

    def _choice(self, index: int, piece: Delta, *, is_first: bool) -> dict[str, Any]:
        number = index // self._body.num_choices
        echo = self._echo(number) if is_first else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + piece.text,
            "logprobs": self._logprobs(number, piece, is_first=is_first) if self._has_logprobs else None,
            "finish_reason": None if piece.finish_reason is None else piece.finish_reason.value,
            **stop_report(piece, self._body, self._ends),
        }
        if self._body.return_token_ids:
            choice |= token_report(piece)
            choice |= {"prompt_token_ids": self._prompts[number]} if is_first else {}
        if self._body.prompt_logprobs is not None:
            count = self._body.prompt_logprobs
            choice["prompt_logprobs"] = prompt_report(self._prompts[number], piece, count, self._names)
        return choice

    def _logprobs(self, number: int, piece: Delta, *, is_first: bool) -> dict[str, Any]:
        tokens, found, offsets = piece.token_ids, [*piece.logprobs], piece.offsets
        before: list[None] = []
        if self._body.echo and piece.end is not None:
            # clients that score prompts count on the entry of the token that they had to ask for
            end, own, offset = piece.end
            tokens, found, offsets = [*tokens, end], [*found, own], [*offsets, offset]
        if self._body.echo:
            length = len(self._echo(number))
            offsets = [length + offset for offset in offsets]
            if is_first:
                prompt, before = self._prompts[number], [None]
                tokens, found = [*prompt, *tokens], [*(piece.prompt_logprobs or []), *found]
                offsets = self._offsets(number) + offsets
        key = self._names.key
        return {
            "tokens": [key(token) for token in tokens],
            "token_logprobs": [*before, *(max(p.chosen, _LEAST_LOGPROB) for p in found)],
            "top_logprobs": [*before, *(self._top(p) for p in found)],
            "text_offset": offsets,
        }

    def _top(self, logprobs: Logprobs) -> dict[str, float]:
        top = logprobs.top[: self._body.logprobs]
        return {self._names.key(token): max(value, _LEAST_LOGPROB) for token, value in top}

    def _offsets(self, number: int) -> list[int]:
        """Where the texts of the prompt's tokens begin in it."""
        is_text = isinstance(self._body.prompts[number], str)
        stream, offsets = Detokenizer(self._tokenizer, skip_special_tokens=is_text), []
        for token in self._prompts[number]:
            offsets.append(stream.position)
            stream.push(token)
        return offsets
