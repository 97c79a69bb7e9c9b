"""Calls of tools, written in their layouts and read back piece by piece."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from flextron.generation.constraints import Grammars
from flextron.generation.tools import Call, Content, More, Tool, ToolCallReader, tool_format, tool_grammar
from tests.tokenizers_zoo import zoo_tokenizer
from tests.trained import trained_model

HERMES, LLAMA = tool_format("{{ messages }}"), tool_format('{"name": function, "parameters": dictionary}')
V3, TEKKEN = tool_format("{{ '[TOOL_CALLS] [' }}"), tool_format("{{ '[TOOL_CALLS][' }}")
V11, V13 = tool_format("[TOOL_CALLS] [CALL_ID] [ARGS]"), tool_format("[TOOL_CALLS] [ARGS]")
MISTRALS = [V3, TEKKEN, V11, V13]
LAYOUTS = [HERMES, LLAMA, *MISTRALS]
OBJECTS = st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=6) | st.lists(st.none()), max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(["get", "a-b"]), OBJECTS), max_size=3)


def written(calls: list[tuple[str, Any]], layout: Any) -> str:
    objects = [(name, json.dumps(value)) for name, value in calls]
    if layout is HERMES:
        return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {v}}}\n</tool_call>' for n, v in objects)
    if layout is LLAMA:
        return "\n".join(f'{{"name": "{n}", "parameters": {v}}}' for n, v in objects)
    if layout in (V3, TEKKEN):
        listed = ", ".join(f'{{"name": "{n}", "arguments": {v}}}' for n, v in objects)
        return f"[TOOL_CALLS]{' ' if layout is V3 else ''}[{listed}]" if objects else ""
    mark = "[CALL_ID]abcdef123" if layout is V11 else ""
    return "".join(f"[TOOL_CALLS]{n}{mark}[ARGS]{v}" for n, v in objects)


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
    layout=st.sampled_from([HERMES, *MISTRALS]),
    calls=CALLS,
    before=st.sampled_from(["", "I look.", "a < b <tool [TOOL_", " x\n\ny "]),
    cuts=st.lists(st.integers(0, 400)),
)
def test_calls_come_back_however_the_text_is_cut(
    layout: Any, calls: list[tuple[str, Any]], before: str, cuts: list[int]
) -> None:
    text = before + ("\n" if calls and before else "") + written(calls, layout)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    pieces = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    content, found = read(pieces, layout)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert content == (before.rstrip() if calls else before)


def test_one_call_in_llamas_words() -> None:
    assert read(['{"name": "get", "parameters": {"a": [1, "}"]}', "}"], LLAMA) == ("", [("get", '{"a": [1, "}"]}')])
    assert read(['{"na', "x"], LLAMA) == ('{"nax', [])


def with_marks() -> PreTrainedTokenizerFast:
    """Mistral's markers are special tokens, which no text stands for."""
    tokenizer = zoo_tokenizer("llama-3")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]})
    return tokenizer


@pytest.mark.parametrize("are_special", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("must_call", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_the_grammar_has_these_answers_and_no_others(
    layout: Any, must_call: bool, parallel: bool, are_special: bool
) -> None:
    tokenizer = with_marks() if are_special else zoo_tokenizer("llama-3")
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tools = [Tool(name="get", parameters=schema), Tool(name="put", parameters={"type": "object"})]
    grammar = tool_grammar(tools, layout, must_call=must_call, parallel=parallel, special=special)
    grammars = Grammars(tokenizer, len(tokenizer), [end])

    def follows(text: str) -> bool:
        state = grammars.constraint("lark", grammar)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        for token in [*tokens, end]:
            if not state.masks()[0][token]:
                return False
            state.accept(token)
        return True

    get, put = ("get", {"a": 5}), ("put", {"b": ["x"]})
    for calls in ([get], [put]):
        assert follows(written(calls, layout))
    assert follows(written([get, put], layout)) == (parallel and layout is not LLAMA)
    assert follows("Just a text.") != must_call
    for other in (written([("get", {"a": "five"})], layout), written([("other", {"a": 5})], layout)):
        assert not follows(other)
    assert not follows(written([get], layout)[:-3])
    assert not follows(written([get], layout) + "x") or (layout is HERMES and parallel and not must_call)
    if layout is not LLAMA and not must_call:
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
