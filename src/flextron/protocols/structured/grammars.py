"""The keys that name a grammar: `response_format`, `guided_*`, `structured_outputs`, `json_schema` and `grammar`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from flextron.generation.constraints import ANY_OBJECT, Kind
from flextron.protocols.sampling import StrictBody
from flextron.serving.errors import ApiError

__all__ = ["Asked", "GrammarBody"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A grammar that a request names."""

    kind: Kind
    given: Any
    """What `Grammars.constraint` takes."""
    param: str
    """The key that named it."""


class JsonSchema(StrictBody):
    """OpenAI's frame of a schema."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Answers follow the schema in any case."""


def _check_kind(given: Any) -> Any:
    kind = given.get("type") if isinstance(given, dict) else None
    if isinstance(kind, str) and kind not in ("text", "json_object", "json_schema"):
        message = f"response_format of type {kind[:50]} is not supported; use json_schema, json_object or text"
        raise ApiError(400, message, param="response_format.type", code="unsupported_value")
    return given


class ResponseFormat(StrictBody):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


_Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=4096)]
_Schema = dict[str, Any] | str | bool


class StructuredOutputs(StrictBody):
    """vLLM's `structured_outputs`."""

    json_: Annotated[_Schema | None, Field(alias="json")] = None
    regex: str | None = None
    choice: _Texts | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GrammarBody(StrictBody):
    """Keys of completions and chat that name a grammar; one of them at most."""

    response_format: Annotated[ResponseFormat | None, BeforeValidator(_check_kind)] = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _Schema | None = None
    guided_regex: str | None = None
    guided_choice: _Texts | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    json_schema: dict[str, Any] | None = None
    """llama-server's key."""
    grammar: str | None = None
    """llama-server's key, in GBNF."""

    def grammar_asked(self) -> Asked | None:
        """The grammar; None if the answer is free.

        Raises:
            ApiError: several keys name one, or a schema is missing.
        """
        found = list(self._all())
        if len(found) > 1:
            message = f"{found[0].param} and {found[1].param} both name a grammar; give one of them"
            raise ApiError(400, message, param=found[1].param, code="invalid_value")
        return found[0] if found else None

    def _all(self) -> Iterator[Asked]:
        if self.response_format is not None and self.response_format.type != "text":
            yield self._of_format(self.response_format)
        given: dict[str, Any] = {f"guided_{name}": getattr(self, f"guided_{name}") for name in _NAMES}
        if (outputs := self.structured_outputs) is not None:
            fields = {name: getattr(outputs, "json_" if name == "json" else name) for name in _NAMES}
            given |= {f"structured_outputs.{name}": value for name, value in fields.items()}
        given |= {"json_schema": self.json_schema, "grammar": self.grammar or None}
        for param, value in given.items():
            name = param.rpartition(".")[2].removeprefix("guided_")
            if value is not None and not (name == "json_object" and value is False):
                yield Asked(_KINDS[name], ANY_OBJECT if name == "json_object" else value, param)

    def _of_format(self, asked: ResponseFormat) -> Asked:
        if asked.type == "json_object":
            return Asked("json", ANY_OBJECT, "response_format")
        if asked.json_schema is None or asked.json_schema.schema_ is None:
            param = "response_format.json_schema.schema"
            raise ApiError(400, f"{param} is missing; give a schema", param=param, code="missing_required_parameter")
        return Asked("json", asked.json_schema.schema_, "response_format")


_KINDS: dict[str, Kind] = {
    "json": "json",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "json_object": "json",
    "json_schema": "json",
}
_NAMES = ("json", "regex", "choice", "grammar", "json_object")
"""What `guided_*` and `structured_outputs` have."""
