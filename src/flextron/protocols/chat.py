"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from flextron.engine.output import Delta
from flextron.generation.templates import ChatTemplate, TemplateError
from flextron.protocols.bodies import ChatBody, Message
from flextron.protocols.responses import prompt_report, respond, stop_report, token_report
from flextron.protocols.structured.history import as_read, with_tools
from flextron.protocols.structured.tools import Calls, Reading, ToolBody
from flextron.serving.errors import bad_request
from flextron.serving.service import Service
from flextron.serving.tokens import TokenNames

__all__ = ["chat", "chat_prompt", "rendered"]

_LEAST_LOGPROB = -9999.0
_DEFAULT_TOKENS = 1024
"""Most tokens of an answer, where neither request nor checkpoint says: some models never end by themselves."""


async def chat(request: Request, service: Service, body: ChatBody) -> Response:
    """Continue a conversation.

    Raises:
        ApiError: the request cannot be answered.
    """
    choice = service.choose(body.model, body.flextron)
    asked = body.max_completion_tokens or body.max_tokens
    service.check(body.num_choices, asked)
    tools = _told_tools(body)
    special = {t.content: i for i, t in service.tokenizer.added_tokens_decoder.items() if t.special}
    calls = Calls.of(tools, body.tool_choice, body.parallel_tool_calls, template_text(service, tools), special)
    if calls is not None and calls.layout.trigger in special:
        # the grammar lets no other special token into the answer
        body = body.model_copy(update={"skip_special_tokens": False})
    grammar = body.grammar_asked()
    prompt = await chat_prompt(service, body)
    most = asked or min(service.room(len(prompt), choice), service.defaults.max_new_tokens or _DEFAULT_TOKENS)
    form = _ChatForm(service.names, body, prompt, calls, service.defaults.ends)
    asked_grammar = grammar if calls is None else calls.grammar(grammar)
    return await respond(request, service, body, choice, [prompt], [most], form, asked_grammar)


async def chat_prompt(service: Service, body: ChatBody) -> list[int]:
    """The tokens that the model reads.

    Raises:
        ApiError: there is no chat template, or it does not take the messages.
    """
    return await service.prompts.encode(
        lambda: rendered(
            service,
            body.messages,
            tools=[tool.model_dump(exclude_none=True) for tool in _told_tools(body) or ()],
            variables=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
            continue_final_message=bool(body.continue_final_message),
        ),
        add_special_tokens=bool(body.add_special_tokens),
    )


def _told_tools(body: ChatBody) -> list[ToolBody] | None:
    return None if body.tool_choice == "none" else body.tools


def template_text(service: Service, tools: Sequence[Any] | None) -> str:
    """The chat template, as far as there is one; of several, that for tools where some are given."""
    try:
        return str(service.tokenizer.get_chat_template(tools=list(tools or ()) or None))
    except ValueError:
        return ""


def rendered(
    service: Service,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
    **options: Any,
) -> str:
    """A conversation as the model was trained to read it.

    Args:
        service: has the chat template.
        messages: messages of the conversation.
        add_generation_prompt: whether an answer is about to begin.
        tools: functions that may be called.
        options: others of `ChatTemplate.render`.

    Raises:
        ApiError: there is no chat template, or it does not take the messages.
    """
    try:
        limits = {"seconds": service.settings.template_seconds, "max_chars": service.prompts.most_chars}
        template = ChatTemplate.of(service.tokenizer, has_tools=bool(tools), **limits)
        if template is None:
            raise bad_request("the model has no chat template; use /v1/completions", "messages")
        given = [message.to_template() for message in messages]

        def render(messages: Sequence[Mapping[str, Any]]) -> str:
            written = with_tools(messages, tools, template.template)
            options_ = {"add_generation_prompt": add_generation_prompt, "tools": list(tools) or None, **options}
            return template.render(written, **options_)

        return render(as_read(given, render) if any("tool_calls" in message for message in given) else given)
    except TemplateError as error:
        raise bad_request(f"the model's chat template does not take these messages: {error}", "messages") from error


class _ChatForm:
    """OpenAI's words for messages."""

    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, names: TokenNames, body: ChatBody, prompt: list[int], calls: Calls | None, ends: Collection[int]
    ) -> None:
        """Take the names of tokens, the conversation in tokens, how answers may call tools, and the ends of texts."""
        self._names, self._body, self._prompt, self._ends = names, body, prompt, ends
        self._calls, self._readings = calls, dict[int, Reading]()
        self._has_logprobs = bool(body.logprobs)

    def report(self, pieces: Sequence[Delta]) -> dict[str, Any]:
        """What vLLM says about the prompt."""
        report: dict[str, Any] = {"prompt_token_ids": self._prompt} if self._body.return_token_ids else {}
        if (count := self._body.prompt_logprobs) is not None:
            report["prompt_logprobs"] = prompt_report(self._prompt, pieces[0], count, self._names)
        return report

    def whole(self, index: int, piece: Delta) -> dict[str, Any]:
        """A message."""
        assert piece.finish_reason is not None
        reason = piece.finish_reason.value
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        if (reading := self._reading(index)) is not None:
            message |= reading.message(piece.text)
            reason = _reason(reason, reading)
        choice = {"index": index, "message": message, "logprobs": self._logprobs(piece)}
        ending = {"finish_reason": reason, **stop_report(piece, self._body, self._ends)}
        return choice | ending | self._ids(piece)

    def opening(self, index: int) -> dict[str, Any]:
        """Who speaks."""
        return self._part(index, {"role": "assistant", "content": ""}, Delta(), None)

    def part(self, index: int, piece: Delta) -> list[dict[str, Any]]:
        """Text, and at the end an entry with the reason alone, as OpenAI has it."""
        reading = self._reading(index)
        deltas: list[dict[str, Any]] = [{"content": piece.text}] if piece.text or piece.token_ids else []
        if reading is not None:
            deltas = reading.deltas(piece.text, is_last=piece.finish_reason is not None)
            if not deltas and piece.token_ids and (self._has_logprobs or self._body.return_token_ids):
                deltas = [{"content": ""}]
        # what is told of tokens stands beside the first of what they mean
        parts = [self._part(index, delta, Delta() if i else piece, None) for i, delta in enumerate(deltas)]
        if piece.finish_reason is not None:
            last = self._part(index, {}, Delta(), _reason(piece.finish_reason.value, reading))
            parts.append(last | stop_report(piece, self._body, self._ends))
        return parts

    def _reading(self, index: int) -> Reading | None:
        return None if self._calls is None else self._readings.setdefault(index, self._calls.reading())

    def _part(self, index: int, delta: dict[str, Any], piece: Delta, reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs(piece) if piece.token_ids else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return choice | (self._ids(piece) if piece.token_ids else {})

    def _ids(self, piece: Delta) -> dict[str, Any]:
        return token_report(piece) if self._body.return_token_ids else {}

    def _logprobs(self, piece: Delta) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        entries = [
            self._entry(token, p.chosen) | {"top_logprobs": [self._entry(t, value) for t, value in p.top]}
            for token, p in zip(piece.token_ids, piece.logprobs, strict=True)
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._names.raw(token)
        return {"token": self._names.key(token), "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(raw) or None}


def _reason(reason: str, reading: Reading | None) -> str:
    """Why an answer ended, where it may have called tools."""
    return "tool_calls" if reason == "stop" and reading is not None and reading.has_calls else reason
