"""What both endpoints do with a request: they queue it, follow it, word its answer, and always free it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from flextron.engine.output import Delta
from flextron.protocols.bodies import GenerationBody
from flextron.protocols.structured.grammars import Asked
from flextron.serving.errors import ApiError, bad_request
from flextron.serving.service import Service
from flextron.serving.session import Session
from flextron.serving.targets import Choice
from flextron.serving.tokens import TokenNames
from flextron.serving.worker import GenerationRequest

__all__ = [
    "CLIENT_LEFT",
    "Form",
    "collect",
    "prompt_report",
    "respond",
    "stop_report",
    "token_report",
    "unless_client_leaves",
]

_T = TypeVar("_T")
_log = logging.getLogger("flextron.server")
CLIENT_LEFT = 499
"""The status that nginx logs for it. Nobody reads the answer."""


class Form(Protocol):
    """How an endpoint words answers. Each method returns entries of `choices`."""

    prefix: str
    """Prefix of ids."""
    whole_object: str
    piece_object: str

    def report(self, pieces: Sequence[Delta]) -> dict[str, Any]:
        """What stands beside the choices: of all answers, or at the beginning of a stream."""

    def whole(self, index: int, piece: Delta) -> dict[str, Any]:
        """The whole answer."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says before the first piece, if anything."""

    def part(self, index: int, piece: Delta) -> list[dict[str, Any]]:
        """A piece of an answer in a stream."""


@dataclass(frozen=True, slots=True)
class _Envelope:
    """What all chunks of an answer share."""

    form: Form
    session: Session
    num_choices: int
    """Number of choices for each prompt."""
    id: str
    created: int

    def whole(self, pieces: Sequence[Delta]) -> dict[str, Any]:
        choices = [self.form.whole(i, piece) for i, piece in enumerate(pieces)]
        head = self._head(self.form.whole_object, choices)
        usage = self.usage(sum(len(p.token_ids) for p in pieces), _num_cached(pieces[:: self.num_choices]))
        return head | self.form.report(pieces) | {"usage": usage, **self._report()}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return self._head(self.form.piece_object, choices) | more

    def first(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return self.chunk(choices, **more, **self.form.report([]), **self._report())

    def changed(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A chunk since which the answer goes on in another sub-network."""
        return self.chunk(choices, **more, **self._report())

    def usage(self, num_tokens: int, num_cached: int) -> dict[str, Any]:
        num_prompt = sum(self.session.num_prompt_tokens[:: self.num_choices])
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        model = self.session.choice.model_id
        return {"id": self.id, "object": kind, "created": self.created, "model": model, "choices": choices}

    def _report(self) -> dict[str, Any]:
        return {"flextron": self.session.choice.report()}


async def respond(
    request: Request,
    service: Service,
    body: GenerationBody,
    choice: Choice,
    prompts: Sequence[list[int]],
    max_tokens: Sequence[int],
    form: Form,
    asked: Asked | None = None,
) -> Response:
    """Answer prompts.

    Args:
        request: to notice when the client leaves.
        service: the engine.
        body: sampling, stop strings, stream or not.
        choice: the sub-network.
        prompts: token ids.
        max_tokens: new tokens at most, of each prompt.
        form: the endpoint's.
        asked: a grammar that answers follow; by default the one that the body names.

    Raises:
        PromptError: the engine cannot take a prompt.
        ApiError: the server does not take the request, or broke it off before anything was sent.
    """
    asked = asked or body.grammar_asked()
    constraint = None
    if asked is not None:
        if body.ignore_eos:
            raise bad_request(f"ignore_eos and {asked.param} exclude each other; leave one of them out", "ignore_eos")
        constraint = await service.prompts.constraint(asked.kind, asked.given, asked.param)
    body.check_tokens(service.core.decoder.config.vocab_size)
    words = await service.prompts.bad_words_ids(body.bad_words or ())
    more = {"logprobs": body.num_logprobs, "prompt_logprobs": body.num_prompt_logprobs}
    requests = [
        GenerationRequest(
            index=i * body.num_choices + j,
            prompt=prompt,
            params=body.sampling(j, most, service.defaults, words, **more),
            stop=body.stops,
            spec=choice.spec,
            router=choice.router,
            constraint=None if constraint is None else constraint.copy(),
            includes_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
        )
        for i, (prompt, most) in enumerate(zip(prompts, max_tokens, strict=True))
        for j in range(body.num_choices)
    ]
    session = await service.open(requests, choice)
    envelope = _Envelope(form, session, body.num_choices, f"{form.prefix}-{uuid.uuid4().hex}", int(time.time()))
    if body.stream:
        return _EventStream(session, _events(envelope, len(requests), body))
    try:
        pieces = await unless_client_leaves(request, collect(session, len(requests)))
    finally:
        session.close()
    return Response(status_code=CLIENT_LEFT) if pieces is None else JSONResponse(envelope.whole(pieces))


async def collect(session: Session, count: int) -> list[Delta]:
    """All answers, whole."""
    pieces = [Delta() for _ in range(count)]
    async for index, delta in session.deltas():
        pieces[index].add(delta)
    return pieces


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, _T]) -> _T | None:
    """The result of a coroutine; None if the client was gone before, which ends the coroutine."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _events(envelope: _Envelope, count: int, body: GenerationBody) -> AsyncIterator[str]:
    """A stream of server-sent events; an error in the middle is one of them, and the last."""
    form, num_tokens, told = envelope.form, 0, None
    pending = [Delta() for _ in range(count)]
    num_cached = [0] * count

    def usage() -> dict[str, Any]:
        return envelope.usage(num_tokens, sum(num_cached[:: envelope.num_choices]))

    def beside() -> dict[str, Any]:
        return {"usage": usage() if body.wants_running_usage else None} if body.wants_usage else {}

    try:
        openings = [o for i in range(count) if (o := form.opening(i)) is not None]
        if openings:
            told = envelope.session.choice
            yield _event(envelope.first(openings, **beside()))
        async for index, delta in envelope.session.deltas():
            num_tokens += len(delta.token_ids)
            num_cached[index] = delta.num_cached_tokens
            pending[index].add(delta)
            if not pending[index].text and delta.finish_reason is None:
                continue
            for part in form.part(index, pending[index]):
                choice = envelope.session.choice
                make = envelope.first if told is None else envelope.chunk if told is choice else envelope.changed
                told = choice
                yield _event(make([part], **beside()))
            pending[index] = Delta()
        if body.wants_usage:
            yield _event(envelope.chunk([], usage=usage()))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    except Exception:
        _log.exception("a stream broke")
        yield _event(ApiError(500, "an unexpected error; the server's log says more", kind="server_error").body())


def _num_cached(pieces: Sequence[Delta]) -> int:
    return sum(piece.num_cached_tokens for piece in pieces)


def token_report(piece: Delta) -> dict[str, Any]:
    """The ids of a piece's tokens, as vLLM words them, and what a token router chose for each."""
    routed = {"flextron": {"mlp_shares": [round(s, 4) for s in piece.mlp_shares]}} if piece.mlp_shares else {}
    return {"token_ids": piece.token_ids, **routed}


def stop_report(piece: Delta, body: GenerationBody, ends: Collection[int]) -> dict[str, Any]:
    """What ended an answer, as vLLM words it: a stop string, or a stop token that the request named and no end."""
    is_named = isinstance(piece.stop, str) or (piece.stop not in ends and piece.stop in (body.stop_token_ids or ()))
    return {"stop_reason": piece.stop if is_named else None}


def prompt_report(prompt: Sequence[int], piece: Delta, count: int, names: TokenNames) -> list[dict[str, Any] | None]:
    """A prompt's log-probabilities as vLLM words them.

    Args:
        prompt: token ids.
        piece: the answer, which holds them.
        count: likeliest tokens beside each.
        names: names of tokens.
    """
    report: list[dict[str, Any] | None] = [None]
    for token, found in zip(prompt[1:], piece.prompt_logprobs or (), strict=True):
        entries = {t: (value, rank) for rank, (t, value) in enumerate(found.top[:count], start=1)}
        entries.setdefault(token, (found.chosen, found.rank))
        report.append(
            {str(t): {"logprob": v, "rank": rank, "decoded_token": names.text(t)} for t, (v, rank) in entries.items()}
        )
    return report


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _EventStream(StreamingResponse):
    """A stream that always closes its session, even if the client leaves before the first event."""

    def __init__(self, session: Session, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._session = session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._session.close()
