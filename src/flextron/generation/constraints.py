"""Answers that follow a grammar: which tokens may come next, by llguidance.

A JSON schema, a regular expression, a list of choices or a context-free grammar becomes one grammar of llguidance's. A
`Constraint` is its state for one answer. It gives the tokens that may come next as a mask, also after drafted tokens,
which it takes back again. `Grammars` belongs to one tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["ANY_OBJECT", "JSON_STYLE", "Constraint", "Grammars", "Kind"]

Kind = Literal["json", "regex", "choice", "grammar", "lark"]
ANY_OBJECT: dict[str, Any] = {"type": "object"}
"""A schema of any JSON object."""
JSON_STYLE: dict[str, Any] = {"whitespace_flexible": True, "whitespace_pattern": r"\x20?|\x0A[\x20\x09]{0,24}"}
"""A space, or a new line with its indentation: JSON allows any, and some models would never come to its end."""


class Constraint:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        """Take a matcher at its start; `vocab_size` is the model's."""
        self._matcher, self._vocab_size = matcher, vocab_size

    def copy(self) -> Constraint:
        """The same state for another answer."""
        return Constraint(self._matcher.deep_copy(), self._vocab_size)

    def masks(self, drafted: Sequence[int] = (), first: int = 0) -> list[Tensor]:
        """Which tokens may come next, (V,) each, true where one may: after `first` drafted tokens, and after each more.

        After a drafted token that the grammar does not allow, or that ends it, any token may come: nobody will ask.
        """
        masks: list[Tensor] = []
        taken = 0
        for i in range(len(drafted) + 1):
            if i >= first:
                masks.append(self._mask() if taken == i else torch.ones(self._vocab_size, dtype=torch.bool))
            if i < len(drafted) and taken == i and not self._matcher.is_stopped():
                taken += self._matcher.try_consume_tokens([drafted[i]])
        if taken:
            self._matcher.rollback(taken)
        return masks

    def accept(self, token: int) -> bool:
        """Go on by a token of the answer; whether nothing more can come, because of the grammar's end or a failure."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())

    @property
    def has_failed(self) -> bool:
        """Whether the grammar cannot go on, as its state has become too large."""
        return bool(self._matcher.is_error())

    def _mask(self) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little", count=min(self._vocab_size, 8 * len(bits)))
        mask_V = torch.from_numpy(allowed.view(np.bool_))
        if len(allowed) == self._vocab_size:
            return mask_V
        return torch.cat([mask_V, torch.zeros(self._vocab_size - len(allowed), dtype=torch.bool)])


class Grammars:
    """Makes constraints for a tokenizer; not to be called from several threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: Sequence[int]) -> None:
        """Read the vocabulary, which takes a moment.

        Args:
            tokenizer: the model's.
            vocab_size: number of the model's scores.
            ends: tokens that end an answer.

        Raises:
            FlextronError: llguidance is not installed, the tokenizer is not a fast one, or no token ends an answer.
        """
        try:
            from llguidance.hf import from_tokenizer
        except ModuleNotFoundError as error:
            raise FlextronError("grammars need llguidance; install it with: pip install 'flextron[serve]'") from error
        size = max(vocab_size, len(tokenizer))
        try:
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=size, eos_token=list(ends) or None)  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            raise FlextronError(f"the tokenizer cannot be used with grammars: {error}") from error
        self._vocab_size = vocab_size

    def constraint(self, kind: Kind, given: Any) -> Constraint:
        """A constraint at its start.

        Args:
            kind: `json` for a schema, `regex`, `choice` for one of some texts, `grammar` in Lark's or GBNF's notation,
                `lark` in Lark's.
            given: the schema as a mapping, JSON text or a boolean; the expression, texts or grammar.

        Raises:
            FlextronError: it is no such thing, or has parts that are not supported.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, _grammar(kind, given), log_level=0)
        if matcher.is_error():
            raise FlextronError(f"the {_NAMES[kind]} cannot be followed: {_short(matcher.get_error())}")
        return Constraint(matcher, self._vocab_size)


_NAMES: dict[Kind, str] = {
    "json": "JSON schema",
    "regex": "regular expression",
    "choice": "choice",
    "grammar": "grammar",
    "lark": "grammar",
}


def _grammar(kind: Kind, given: Any) -> str:
    """The grammar in llguidance's notation."""
    from llguidance import LLMatcher, grammar_from

    try:
        if kind == "json":
            schema = json.loads(given) if isinstance(given, str) else given
            if isinstance(schema, bool):
                schema = {} if schema else {"not": {}}
            if not isinstance(schema, Mapping):
                raise FlextronError("a JSON schema must be an object or a boolean")
            return str(LLMatcher.grammar_from_json_schema(dict(schema), defaults=JSON_STYLE))  # type: ignore[arg-type]
        if kind == "regex":
            return str(LLMatcher.grammar_from_regex(given))
        if kind == "choice":
            if not given:
                raise FlextronError("a choice must have at least one text")
            return str(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in given)))
        return str(LLMatcher.grammar_from_lark(given) if kind == "lark" else grammar_from("grammar", given))
    except (ValueError, RecursionError) as error:
        raise FlextronError(f"the {_NAMES[kind]} cannot be read: {_short(str(error))}") from error


def _short(text: str) -> str:
    said = " ".join(text.split())
    return said if len(said) <= 300 else f"{said[:297]}..."
