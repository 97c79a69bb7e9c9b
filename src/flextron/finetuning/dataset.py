"""JSONL to examples: conversations through the model's chat template, or prompts with completions.

The model learns what the assistant says, or the completion, and the token that ends it; the rest is context. A token
that begins before the learnt text counts as context. What is wrong with a file is told with the number of the line.
Lines have a limit, because a tokenizer takes some hundred bytes of memory for each character.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.finetuning.example import Example
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.generation.encoding import beginning
from flextron.generation.templates import ChatTemplate, TemplateError

__all__ = ["MOST_LINE_BYTES", "Dataset", "DatasetError", "read_dataset"]

_MOST_CHARS = 1_000_000
"""Most characters of an example's text."""
MOST_LINE_BYTES = 12 * _MOST_CHARS + 65_536
"""JSON may write a character as two escapes of six letters."""

_ROLES = ("system", "developer", "user", "assistant")
_KINDS = {"messages": frozenset({"messages"}), "prompt": frozenset({"prompt", "completion"})}

_OTHER_ANSWER = "\ue000"
"""Begins as no answer does."""

Span = tuple[int, int]
"""Characters of a text, from and up to."""
Turn = dict[str, str]
"""One message of a conversation, as templates expect it."""


class DatasetError(FlextronError):
    """A file that cannot be trained on."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a file holds."""

    examples: Sequence[Example]
    num_truncated: int
    """Examples that were cut to the allowed number of tokens."""


def read_dataset(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    hyperparameters: Hyperparameters,
    context: int,
    vocab_size: int | None = None,
) -> Dataset:
    """Read a JSONL file.

    Args:
        path: the file; each line is `{"messages": [{"role", "content"}, …]}` or `{"prompt", "completion"}`.
        tokenizer: tokenizer of the model; one that tells where tokens begin.
        hyperparameters: which say how long examples may be.
        context: positions of the model.
        vocab_size: tokens that the model knows; by default all that the tokenizer makes.

    Raises:
        DatasetError: a line is malformed or too long (named by its number), or the file has no example.
    """
    limit = min(hyperparameters.max_tokens or context, context)
    reader = _Reader(tokenizer, limit, vocab_size, may_truncate=hyperparameters.over_long == "truncate")
    examples = []
    for number, line in _lines(path):
        try:
            examples.append(reader.example(_record(line)))
        except DatasetError as error:
            raise DatasetError(f"line {number} {error}") from error
    if not examples:
        raise DatasetError("the file has no example; give one JSON object a line")
    return Dataset(examples, reader.num_truncated)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MOST_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MOST_LINE_BYTES:
                raise DatasetError(
                    f"line {number} is longer than {MOST_LINE_BYTES} bytes; split it into several examples"
                )
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield number, text


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
        # halves of surrogate pairs come in by escapes, and no tokenizer takes them
        json.dumps(record, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise DatasetError(f"is not UTF-8 ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise DatasetError(f"is not valid JSON ({reason})") from error
    if not isinstance(record, dict):
        raise DatasetError("is not a JSON object")
    return record


class _Reader:
    """Makes examples of records; all of a file are of one kind."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, limit: int, vocab_size: int | None, *, may_truncate: bool
    ) -> None:
        self._tokenizer, self._limit, self._vocab_size, self._may_truncate = tokenizer, limit, vocab_size, may_truncate
        self._begin = beginning(tokenizer)
        self._kind: str | None = None
        self.num_truncated = 0

    def example(self, record: dict[str, Any]) -> Example:
        kind = next((kind for kind in _KINDS if kind in record), None)
        if kind is None:
            raise DatasetError("has neither messages nor prompt and completion")
        unknown = sorted(set(record) - _KINDS[kind])
        if unknown:
            raise DatasetError(f"has the key {unknown[0][:50]!r}, which is not supported; leave it out")
        if self._kind not in (None, kind):
            raise DatasetError("is of another kind than the first: use either messages or prompt and completion")
        self._kind = kind
        if kind == "messages":
            text, spans = _conversation(*_turns(record["messages"]), self._template())
            return self._encode([], text, spans, ending=[])
        prompt, completion = record["prompt"], record.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
            raise DatasetError("must have a prompt and a completion that are texts, the completion not empty")
        end = self._tokenizer.eos_token_id
        text, span = prompt + completion, (len(prompt), len(prompt) + len(completion))
        return self._encode(self._begin, text, [span], ending=[] if end is None else [int(end)])

    def _template(self) -> ChatTemplate:
        try:
            template = ChatTemplate.of(self._tokenizer, max_chars=_MOST_CHARS)
        except TemplateError as error:
            raise DatasetError(f"has messages, but {error}") from error
        if template is None:
            raise DatasetError("has messages, but the model has no chat template; use prompt and completion")
        return template

    def _encode(self, begin: list[int], text: str, spans: Sequence[Span], ending: list[int]) -> Example:
        """An example of a text; what a chat template has written begins as it should."""
        if len(text) > _MOST_CHARS:
            raise DatasetError(f"has {len(text)} characters, more than {_MOST_CHARS}; make several examples of it")
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in found["offset_mapping"]]
        tokens = array("i", [*begin, *found["input_ids"], *ending])
        mask = bytearray(len(tokens))
        for i, start in enumerate(starts, len(begin)):
            mask[i] = any(first <= start < last for first, last in spans)
        mask[len(tokens) - len(ending) :] = b"\1" * len(ending)
        self._check_tokens(tokens)
        if len(tokens) > self._limit:
            if not self._may_truncate:
                raise DatasetError(
                    f"has {len(tokens)} tokens, more than {self._limit}; shorten it, or set over_long to 'truncate'"
                )
            del tokens[self._limit :], mask[self._limit :]
            self.num_truncated += 1
        mask[:1] = b"\0"  # nothing comes before the first
        if not any(mask):
            raise DatasetError(f"has nothing to learn within its first {self._limit} tokens; shorten its prompt")
        return Example(tokens, bytes(mask))

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        unknown = [] if self._vocab_size is None else [t for t in tokens if t >= self._vocab_size]
        if unknown:
            name = self._tokenizer.convert_ids_to_tokens(unknown[0])
            raise DatasetError(
                f"holds the token {name!r} ({unknown[0]}), which is outside the model's vocabulary of "
                f"{self._vocab_size}; the tokenizer has tokens that the model lacks, so leave them out"
            )


def _conversation(turns: Sequence[Turn], is_learnt: Sequence[bool], template: ChatTemplate) -> tuple[str, list[Span]]:
    """A conversation's text, and where in it the assistant speaks."""

    def render(turns: Sequence[Turn], *, begins_answer: bool = False) -> str:
        try:
            return template.render(turns, add_generation_prompt=begins_answer)
        except TemplateError as error:
            raise DatasetError(f"does not fit the model's chat template: {error}") from error

    text, spans = render(turns), []
    for i in [i for i, learnt in enumerate(is_learnt) if learnt]:
        spoken = render(turns[: i + 1])
        if not text.startswith(spoken):
            raise DatasetError(
                "cannot be taken apart, because the model's chat template rewrites earlier turns; "
                "use conversations with one answer, or prompt and completion"
            )
        before = render(turns[:i], begins_answer=True)
        if spoken.startswith(before):
            spans.append((len(before), len(spoken)))
            continue
        # what invites an answer may open what the answer itself does not have, such as a thought
        other = render([*turns[:i], turns[i] | {"content": _OTHER_ANSWER}])
        begin = _num_shared(before, spoken, other)
        if begin < len(render(turns[:i])):
            raise DatasetError(
                "cannot be taken apart, because the model's chat template writes a question in another way once it is "
                "answered; use prompt and completion"
            )
        spans.append((begin, len(spoken)))
    return text, spans


def _num_shared(*texts: str) -> int:
    """Characters with which all of the texts begin."""
    pairs = enumerate(zip(*texts, strict=False))
    return next((at for at, letters in pairs if len(set(letters)) > 1), min(map(len, texts)))


def _turns(messages: Any) -> tuple[list[Turn], list[bool]]:
    """Messages as templates expect them, and which of them are to be learnt."""
    if not isinstance(messages, list) or not messages:
        raise DatasetError("has messages that are no list, or an empty one")
    turns, is_learnt = [], []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DatasetError(f"has a message {i} that is no JSON object")
        role, content, weight = message.get("role"), _text(message.get("content")), message.get("weight", 1)
        if role not in _ROLES:
            raise DatasetError(f"has a message {i} whose role is none of {', '.join(_ROLES)}")
        unknown = sorted(set(message) - {"role", "content", "weight"})
        if unknown:
            raise DatasetError(f"has a message {i} with the key {unknown[0][:50]!r}, which is not supported")
        if content is None or (role == "assistant" and not content):
            raise DatasetError(f"has a message {i} without text")
        if isinstance(weight, bool) or weight not in (0, 1) or ("weight" in message and role != "assistant"):
            raise DatasetError(f"has a message {i} with a bad weight: 0 or 1, for the assistant's only")
        if role in ("system", "developer") and i > 0:
            raise DatasetError(f"has a message {i} with the role {role}, which only the first may have")
        turns.append({"role": "system" if role == "developer" else role, "content": content})
        is_learnt.append(role == "assistant" and weight == 1)
    if is_learnt[0] and len(turns) > 1:
        raise DatasetError("begins with an answer; put a question before it, or give it the weight 0")
    if turns[-1]["role"] != "assistant" or not any(is_learnt) or len(turns) < 2:
        raise DatasetError("must end with an answer of the assistant, and have one to learn")
    return turns, is_learnt


def _text(content: Any) -> str | None:
    """A content's text; None if it has none."""
    if isinstance(content, list):
        # parts of other types may have a text, too, which is not all that they have
        is_text = [isinstance(part, dict) and part.get("type", "text") == "text" for part in content]
        parts = [part.get("text") if known else None for part, known in zip(content, is_text, strict=True)]
        return "".join(str(part) for part in parts) if all(isinstance(part, str) for part in parts) else None
    return content if isinstance(content, str) else None
