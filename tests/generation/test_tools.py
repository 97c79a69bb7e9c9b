"""Calls of tools, written in their layouts and read back piece by piece."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.generation.constraints import Grammars
from flextron.generation.tools import Call, Content, More, Tool, ToolCallReader, tool_format, tool_grammar
from tests.trained import trained_model

HERMES, LLAMA = tool_format("{{ messages }}"), tool_format('{"name": function, "parameters": dictionary}')
LAYOUTS = [HERMES, LLAMA]
OBJECTS = st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=6) | st.lists(st.none()), max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(["get", "a-b"]), OBJECTS), max_size=3)


def written(calls: list[tuple[str, Any]], layout: Any) -> str:
    texts = (layout.begin + name + layout.middle + json.dumps(value) + layout.end for name, value in calls)
    return "\n".join(texts)


def read(pieces: list[str], layout: Any) -> tuple[str, list[tuple[str, str]]]:
    reader, text, calls = ToolCallReader(layout), "", []
    for found in [x for piece in pieces for x in reader.push(piece)] + reader.finish():
        match found:
            case Content(more):
                text += more
            case Call(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case More(index, more):
                assert index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + more)
    return text, calls


@settings(max_examples=200, deadline=None)
@given(
    calls=CALLS, before=st.sampled_from(["", "I look.", "a < b <tool", " x\n\ny "]), cuts=st.lists(st.integers(0, 400))
)
def test_calls_come_back_however_the_text_is_cut(calls: list[tuple[str, Any]], before: str, cuts: list[int]) -> None:
    text = before + ("\n" if calls and before else "") + written(calls, HERMES)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    pieces = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    content, found = read(pieces, HERMES)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert content == (before.rstrip() if calls else before)


def test_one_call_in_llamas_words() -> None:
    assert read(['{"name": "get", "parameters": {"a": [1, "}"]}', "}"], LLAMA) == ("", [("get", '{"a": [1, "}"]}')])
    assert read(['{"na', "x"], LLAMA) == ('{"nax', [])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("must_call", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_the_grammar_has_these_answers_and_no_others(layout: Any, must_call: bool, parallel: bool) -> None:
    model = trained_model()
    assert model.tokenizer is not None
    end = model.generation_defaults.ends[0]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tools = [Tool(name="get", parameters=schema), Tool(name="put", parameters={"type": "object"})]
    grammar = tool_grammar(tools, layout, must_call=must_call, parallel=parallel)
    grammars = Grammars(model.tokenizer, model.decoder.config.vocab_size, model.generation_defaults.ends)

    def follows(text: str) -> bool:
        state = grammars.constraint("lark", grammar)
        for token in [*model.tokenizer.encode(text, add_special_tokens=False), end]:  # type: ignore[union-attr]
            if not state.masks()[0][token]:
                return False
            state.accept(token)
        return True

    get, put = ("get", {"a": 5}), ("put", {"b": ["x"]})
    for calls in ([get], [put]):
        assert follows(written(calls, layout))
    assert follows(written([get, put], layout)) == (parallel and layout is HERMES)
    assert follows("Just a text.") != must_call
    assert not follows(written([("get", {"a": "five"})], layout))
    assert not follows(written([("other", {"a": 5})], layout))
    assert not follows(written([get], layout)[:-3])
    if layout is HERMES and not must_call:
        assert follows("I look it up.\n" + written([get], layout))


def test_a_grammar_that_cannot_go_on_ends_its_answer_alone() -> None:
    model = trained_model()
    assert model.tokenizer is not None
    grammars = Grammars(model.tokenizer, model.decoder.config.vocab_size, model.generation_defaults.ends)
    state = grammars.constraint("choice", ["yes"])
    other = state.copy()
    assert state.accept(model.tokenizer.encode("n", add_special_tokens=False)[0])  # type: ignore[union-attr]
    assert state.has_failed
    assert not other.has_failed
    assert state.masks()[0].sum() <= 1
