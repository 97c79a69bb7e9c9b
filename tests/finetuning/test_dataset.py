"""Examples against what the tokenizer decodes; every malformed line by its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from flextron.errors import FlextronError
from flextron.finetuning.dataset import MOST_LINE_BYTES, Dataset, DatasetError, read_dataset
from flextron.finetuning.example import Example
from flextron.finetuning.hyperparameters import Hyperparameters
from tests.jobs.making import CHAT_TEMPLATE, jsonl, tokenizer

USER, ANSWER = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello, you"}
GOOD = {"messages": [USER, ANSWER]}


@pytest.fixture(scope="module")
def tok() -> PreTrainedTokenizerBase:
    return tokenizer()


def read(path: Path, tok: PreTrainedTokenizerBase, content: bytes, context: int = 64, **chosen: Any) -> Dataset:
    (path / "data").write_bytes(content)
    return read_dataset(path / "data", tok, Hyperparameters(**chosen), context)


def learnt(tok: PreTrainedTokenizerBase, example: Example) -> str:
    """The text of the tokens that are trained on."""
    pairs = zip(example.tokens, example.mask, strict=True)
    return str(tok.decode([token for token, is_trained in pairs if is_trained]))


def test_prompt_and_completion(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    (example,) = read(tmp_path, tok, jsonl([{"prompt": "2 and 3 are", "completion": " five, é 中"}])).examples
    assert tok.decode(example.tokens) == f"2 and 3 are five, é 中{tok.eos_token}"
    assert learnt(tok, example) == f" five, é 中{tok.eos_token}"


def test_the_assistants_turns_alone_are_learnt(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    system, again = {"role": "system", "content": "Be kind"}, {"role": "assistant", "content": "Bye"}
    (example,) = read(tmp_path, tok, jsonl([{"messages": [system, USER, ANSWER, USER, again]}]), context=200).examples
    whole = "<system>Be kind</>\n<user>Hi there</>\n<assistant>Hello, you</>\n<user>Hi there</>\n<assistant>Bye</>\n"
    assert tok.decode(example.tokens) == whole
    assert learnt(tok, example).replace("</>\n", "|") == "Hello, you|Bye|"


def test_weights_parts_and_the_developer(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    messages = [
        {"role": "developer", "content": "Be kind"},
        USER,
        ANSWER | {"weight": 0},
        USER,
        {"role": "assistant", "content": parts, "weight": 1},
    ]
    (example,) = read(tmp_path, tok, jsonl([{"messages": messages}]), context=200).examples
    assert str(tok.decode(example.tokens)).startswith("<system>Be kind</>")
    assert learnt(tok, example) == "Good day</>\n"


def test_blank_lines_and_a_byte_order_mark(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    content = b"\xef\xbb\xbf\n" + jsonl([GOOD]) + b"\r\n  \n" + jsonl([GOOD])[:-1]
    assert len(read(tmp_path, tok, b"\xef\xbb\xbf" + jsonl([GOOD])).examples) == 1
    assert len(read(tmp_path, tok, content).examples) == 2


def test_over_long_examples(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    long = {"prompt": "a b c ", "completion": "d " * 100}
    short = {"prompt": "a ", "completion": "b"}
    found = read(tmp_path, tok, jsonl([short, long]), context=20)
    assert found.num_truncated == 1
    assert [len(e.tokens) for e in found.examples][1] == 20
    found = read(tmp_path, tok, jsonl([short, long]), max_tokens=10)
    assert len(found.examples[1].tokens) == len(found.examples[1].mask) == 10
    with pytest.raises(DatasetError, match=r"line 2 has .* tokens, more than 20; shorten it"):
        read(tmp_path, tok, jsonl([short, long]), context=20, over_long="refuse")
    with pytest.raises(DatasetError, match="line 1 has nothing to learn within its first 20 tokens"):
        read(tmp_path, tok, jsonl([{"prompt": "a b " * 50, "completion": "c"}]), context=20)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "is not valid JSON"),
        (b"[1]", "is not a JSON object"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"prompt": "\\ud800", "completion": "b"}', "is not UTF-8"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"text": "a"}', "neither messages nor prompt"),
        (b'{"prompt": "a"}', "must have a prompt and a completion"),
        (b'{"prompt": "a", "completion": ""}', "must have a prompt and a completion"),
        (b'{"prompt": "a", "completion": 1}', "must have a prompt and a completion"),
        (b'{"prompt": "a", "completion": "b"}', "another kind"),
        (b'{"messages": [], "tools": []}', "key 'tools'"),
        (b'{"messages": []}', "an empty one"),
        (b'{"messages": [1]}', "message 0 that is no JSON object"),
        (b'{"messages": {"role": "user"}}', "no list"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, tok: PreTrainedTokenizerBase, line: bytes, said: str) -> None:
    good = jsonl([{"prompt": "a", "completion": "b"} if said.startswith("must have") else GOOD])
    with pytest.raises(DatasetError, match=r"^line 3 ") as refused:
        read(tmp_path, tok, good + good + line + b"\n" + good)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([USER], "must end with an answer"),
        ([ANSWER], "must end with an answer"),
        ([USER, ANSWER, USER], "must end with an answer"),
        ([USER, ANSWER | {"weight": 0}], "have one to learn"),
        ([USER | {"role": "tool"}, ANSWER], "message 0 whose role"),
        ([USER | {"role": ["user"]}, ANSWER], "message 0 whose role"),
        ([USER, {"role": "system", "content": "a"}, ANSWER], "which only the first may have"),
        ([USER, ANSWER | {"content": None}], "message 1 without text"),
        ([USER, ANSWER | {"content": ""}], "message 1 without text"),
        ([USER, ANSWER | {"content": [{"type": "image_url"}]}], "message 1 without text"),
        ([USER, ANSWER | {"content": [{"type": "image_url", "text": "a"}]}], "message 1 without text"),
        ([ANSWER, USER, ANSWER], "begins with an answer"),
        ([USER, ANSWER | {"tool_calls": []}], "key 'tool_calls'"),
        ([USER, ANSWER | {"weight": 0.5}], "bad weight"),
        ([USER | {"weight": 1}, ANSWER], "bad weight"),
    ],
)
def test_wrong_conversations(
    tmp_path: Path, tok: PreTrainedTokenizerBase, messages: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(DatasetError, match=r"^line 1 ") as refused:
        read(tmp_path, tok, jsonl([{"messages": messages}]))
    assert said in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_files(tmp_path: Path, tok: PreTrainedTokenizerBase, content: bytes) -> None:
    with pytest.raises(DatasetError, match="no example"):
        read(tmp_path, tok, content)


def test_chat_templates_that_do_not_do(tmp_path: Path) -> None:
    tok = tokenizer()
    tok.chat_template = None
    with pytest.raises(DatasetError, match="line 1 has messages, but the model has no chat template"):
        read(tmp_path, tok, jsonl([GOOD]))
    tok.chat_template = "{{ raise_exception('not so') }}"
    with pytest.raises(DatasetError, match=r"line 1 does not fit the model's chat template: not so"):
        read(tmp_path, tok, jsonl([GOOD]))
    tok.chat_template = "{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}"
    with pytest.raises(DatasetError, match="line 1 cannot be taken apart"):
        read(tmp_path, tok, jsonl([GOOD]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
odd_messages = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "x", 1]), "content": json_values})
)
odd_records = st.fixed_dictionaries(
    {}, optional={"messages": odd_messages | json_values, "prompt": json_values, "completion": json_values}
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(odd_records | json_values, max_size=3).map(jsonl) | st.binary(max_size=60))
def test_no_file_is_too_strange(tmp_path: Path, tok: PreTrainedTokenizerBase, content: bytes) -> None:
    try:
        found = read(tmp_path, tok, content)
    except DatasetError:
        return
    assert all(any(e.mask) and not e.mask[0] for e in found.examples)


def test_hyperparameters_go_through_json() -> None:
    chosen = Hyperparameters(rank=4, target_modules=("q_proj",), over_long="refuse", checkpoint_every=3)
    assert Hyperparameters.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
    assert Hyperparameters.from_dict({"n_epochs": "auto", "batch_size": None}) == Hyperparameters()


@pytest.mark.parametrize(
    "values",
    [
        {"n_epochs": 0},
        {"n_epochs": True},
        {"n_epochs": 10**30},
        {"n_epochs": [1]},
        {"batch_size": 1.5},
        {"learning_rate_multiplier": 0},
        {"learning_rate_multiplier": float("nan")},
        {"learning_rate_multiplier": 10**400},
        {"target_modules": []},
        {"target_modules": "q_proj"},
        {"target_modules": [{}]},
        {"target_modules": ["lm_head"]},
        {"over_long": "drop"},
        {"over_long": {}},
        {"optimizer": "sgd"},
    ],
)
def test_bad_hyperparameters(values: dict[str, Any]) -> None:
    with pytest.raises(FlextronError, match="|".join([*values, "hyperparameter"])):
        Hyperparameters.from_dict(values)


THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}</>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


@pytest.mark.parametrize("answer", ["Hello, you", "<b>", "<|Assistant|>", "<think>\nhm</think><think>", "\n"])
def test_an_answer_after_an_opened_thought(tmp_path: Path, tok: PreTrainedTokenizerBase, answer: str) -> None:
    tok.chat_template = THINKING
    try:
        record = {"messages": [USER, ANSWER | {"content": answer}]}
        (example,) = read(tmp_path, tok, jsonl([record]), context=200).examples
        assert learnt(tok, example) == answer.split("</think>")[-1] + "</>"
    finally:
        tok.chat_template = CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}!", "in another way"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[9].content }}", "does not fit the model's chat template"),
    ],
)
def test_templates_that_do_not_serve(tmp_path: Path, tok: PreTrainedTokenizerBase, template: str, said: str) -> None:
    tok.chat_template = template
    try:
        with pytest.raises(DatasetError, match=said):
            read(tmp_path, tok, jsonl([GOOD]))
    finally:
        tok.chat_template = CHAT_TEMPLATE


def test_tokens_that_the_model_lacks(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    (tmp_path / "data").write_bytes(jsonl([{"prompt": "a ", "completion": "b"}]))
    tokens = read_dataset(tmp_path / "data", tok, Hyperparameters(), 64).examples[0].tokens
    assert read_dataset(tmp_path / "data", tok, Hyperparameters(), 64, max(tokens) + 1).examples
    with pytest.raises(
        DatasetError, match=rf"line 1 holds the token .* \({max(tokens)}\), .* vocabulary of {max(tokens)}"
    ):
        read_dataset(tmp_path / "data", tok, Hyperparameters(), 64, max(tokens))


def test_lines_have_a_limit(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    good = jsonl([{"prompt": "a", "completion": "b"}])
    with pytest.raises(DatasetError, match="line 2 has 1000001 characters, more than 1000000"):
        read(tmp_path, tok, good + jsonl([{"prompt": "a", "completion": "b" * 1_000_000}]))
    with pytest.raises(DatasetError, match=r"line 2 is longer than \d+ bytes"):
        read(tmp_path, tok, good + b"x" * (MOST_LINE_BYTES + 1))
    messages = [USER, ANSWER | {"content": "b" * 1_000_000}]
    with pytest.raises(DatasetError, match=r"line 1 does not fit .* characters, more than 1000000"):
        read(tmp_path, tok, jsonl([{"messages": messages}]))
