"""Where texts begin and end, from a checkpoint to the elastic one and back out, against stock `transformers`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

import flextron
from flextron import ElasticModel, Engine, SamplingParams
from flextron.api.texts import sequences
from flextron.cli.main import app
from flextron.errors import FlextronError
from flextron.finetuning.dataset import read_dataset
from flextron.finetuning.hyperparameters import Hyperparameters
from tests.checkpoints.families_cases import HEADS, SIZES, hf_logits, random_from, relative_error
from tests.generation.tokenizer_cases import BEGINNINGS, make_tokenizer
from tests.server.running import running

PROMPT = "Once upon a time"
TEXT = ["the quick brown fox said: hello, hello. " * 4, "a small model learned to be smaller still. " * 4] * 4
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


# Whether an answer's text begins with the space between it and the prompt is tested elsewhere: here it is stripped.


def greedy(directory: Path, tokens: list[int], **options: Any) -> list[int]:
    """What stock `transformers` answers, by all that the directory says."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    prompt = torch.tensor([tokens])
    options |= {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return [int(i) for i in whole[0, len(tokens) :]]


def checkpoint(tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    """A random model that writes on, with a tokenizer and no `generation_config.json`."""
    config = LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)}, **HEADS | {"max_position_embeddings": 128})
    config.eos_token_id = tokenizer.eos_token_id
    random_from(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    return directory


def converted(directory: Path) -> ElasticModel:
    return flextron.convert(directory, calibration=TEXT, num_calibration_tokens=128, context=32)


def with_end(directory: Path, where: str) -> list[int]:
    """Name the sixth token of the stock answer as an end, and give the answer up to it."""
    tokens = AutoTokenizer.from_pretrained(directory)(PROMPT)["input_ids"]
    plain = greedy(directory, tokens, eos_token_id=-1)
    if where == "generation_config.json":
        GenerationConfig(bos_token_id=1, eos_token_id=[2, plain[5]], pad_token_id=0).save_pretrained(directory)
    else:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, plain[5]]}))
    answer = greedy(directory, tokens)
    assert answer[-1] == plain[5], "the stock model stops at it"
    return answer[:-1]


@pytest.mark.parametrize("case", BEGINNINGS)
@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_prompts_and_answers_are_those_of_transformers(case: str, where: str, tmp_path: Path) -> None:
    source = checkpoint(make_tokenizer(case), tmp_path / "hf")
    answer = with_end(source, where)
    stock = AutoTokenizer.from_pretrained(source)
    prompt, text = stock(PROMPT)["input_ids"], stock.decode(answer).strip()
    converted(source).save(tmp_path / "elastic")
    model = flextron.load(tmp_path / "elastic")
    (got,) = Engine(model, kv_cache_gb=0.01).generate(PROMPT, SamplingParams(max_tokens=12))
    assert got.num_prompt_tokens == len(prompt)
    assert list(got.token_ids) == answer
    assert got.finish_reason == "stop"
    assert model.generate(PROMPT, max_tokens=12).strip() == text
    dense = model.extract(model.space.full)
    assert dense.generate(PROMPT, max_tokens=12).strip() == text
    # saved again, elastic and dense, nothing is lost
    dense.save_pretrained(tmp_path / "dense")
    for directory in (tmp_path / "elastic", tmp_path / "dense"):
        assert AutoTokenizer.from_pretrained(directory)(PROMPT)["input_ids"] == prompt
        assert greedy(directory, prompt)[:-1] == answer
        has_file = where == "generation_config.json"
        assert (directory / where).exists()
        assert (directory / "generation_config.json").exists() == has_file
        if has_file:
            kept = json.loads((directory / where).read_text())
            assert kept == json.loads((source / where).read_text())


def test_an_option_leaves_the_beginning_out(tmp_path: Path) -> None:
    source = checkpoint(make_tokenizer("llama-2"), tmp_path / "hf")
    stock = AutoTokenizer.from_pretrained(source)
    bare = stock(PROMPT, add_special_tokens=False)["input_ids"]
    text = stock.decode(greedy(source, bare)).strip()
    model = converted(source)
    assert text != stock.decode(greedy(source, stock(PROMPT)["input_ids"])).strip(), "the beginning matters"
    (got,) = Engine(model, kv_cache_gb=0.01).generate(PROMPT, SamplingParams(max_tokens=12), add_special_tokens=False)
    assert (got.num_prompt_tokens, got.text.strip()) == (len(bare), text)
    assert model.generate(PROMPT, max_tokens=12, add_special_tokens=False).strip() == text
    dense = model.extract(model.space.full)
    assert dense.generate(PROMPT, max_tokens=12, add_special_tokens=False).strip() == text
    model.save(tmp_path / "elastic")
    command = ["generate", str(tmp_path / "elastic"), PROMPT, "--max-tokens", "12", "--json"]
    said = CliRunner().invoke(app, [*command, "--no-add-special-tokens"])
    assert json.loads(said.stdout)["text"].strip() == text
    assert json.loads(CliRunner().invoke(app, command).stdout)["text"].strip() != text


def test_the_server_begins_texts_and_not_chats(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("llama-2")
    tokenizer.chat_template = CHAT
    source = checkpoint(tokenizer, tmp_path / "hf")
    answer = with_end(source, "generation_config.json")
    stock = AutoTokenizer.from_pretrained(source)
    messages = [{"role": "user", "content": PROMPT}]
    chat = stock.apply_chat_template(messages, return_dict=False)
    assert chat.count(stock.bos_token_id) == 1, "transformers adds none beside the template's"
    with running(converted(source), {"kv_cache_gb": 0.01}) as server:
        client = server.client()

        def complete(prompt: Any, **extra: Any) -> tuple[int, str]:
            got = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0, extra_body=extra)
            assert got.usage is not None
            return got.usage.prompt_tokens, got.choices[0].text.strip()

        ids = stock(PROMPT)["input_ids"]
        assert complete(PROMPT) == complete(PROMPT, add_special_tokens=True) == (len(ids), stock.decode(answer).strip())
        assert complete([PROMPT]) == complete(ids) == complete(PROMPT)
        bare = stock(PROMPT, add_special_tokens=False)["input_ids"]
        assert complete(PROMPT, add_special_tokens=False) == complete(bare)
        for extra, count in (({}, len(chat)), ({"add_special_tokens": True}, len(chat) + 1)):
            said = client.chat.completions.create(
                model="tiny",
                messages=messages,  # type: ignore[arg-type]
                max_tokens=4,
                extra_body=extra,
            )
            assert said.usage is not None
            assert said.usage.prompt_tokens == count


def test_sampling_settings_of_the_checkpoint_hold_where_a_request_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = checkpoint(make_tokenizer("qwen2"), tmp_path / "hf")
    asked = {"do_sample": True, "temperature": 1e-6, "num_beams": 4, "max_new_tokens": 7}
    (source / "generation_config.json").write_text(json.dumps(asked))
    tokens = AutoTokenizer.from_pretrained(source)(PROMPT)["input_ids"]
    likeliest = greedy(source, tokens, eos_token_id=-1, num_beams=1)
    model = converted(source)
    with caplog.at_level(logging.WARNING, "flextron"):
        engine = Engine(model, kv_cache_gb=0.01)
    (told,) = [r.getMessage() for r in caplog.records if r.name.startswith("flextron")]
    assert "num_beams 4" in told
    # so cold that it is greedy; without the setting the server draws from 67 nearly equal tokens
    assert list(engine.generate(PROMPT)[0].token_ids) == likeliest[:7]
    with running(model, {"kv_cache_gb": 0.01}) as server:
        client = server.client()
        texts = [
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, **options).choices[0].text  # type: ignore[call-overload]
            for options in ({}, {"temperature": 2.0, "seed": 1})
        ]
        assert texts[0] == AutoTokenizer.from_pretrained(source).decode(likeliest) != texts[1]
        with_template = model.tokenizer
        assert with_template is not None
        server.service.tokenizer.chat_template = CHAT.replace("bos_token", "''")
        said = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": PROMPT}])
        assert said.usage is not None
        assert said.usage.completion_tokens == 7


def test_a_malformed_file_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    source = checkpoint(make_tokenizer("qwen2"), tmp_path / "hf")
    (source / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(FlextronError, match=r"generation_config.json has a bad eos_token_id .*; mend it, or delete"):
        converted(source)


@pytest.mark.parametrize("case", BEGINNINGS)
def test_sequences_begin_as_texts_do_and_are_scored_as_transformers_scores_them(case: str, tmp_path: Path) -> None:
    source = checkpoint(make_tokenizer(case), tmp_path / "hf")
    stock = AutoTokenizer.from_pretrained(source)
    tokens_BT = sequences(TEXT, stock, num_tokens=96, context=32)
    begin = stock.convert_tokens_to_ids(BEGINNINGS[case])
    assert tokens_BT.shape == (3, 32)
    assert all(row[: len(begin)].tolist() == begin for row in tokens_BT)
    first, second = (stock(text, add_special_tokens=False)["input_ids"] for text in TEXT[:2])
    packed = [*begin, *first, stock.eos_token_id, *begin, *second]
    assert tokens_BT[0].tolist() == packed[:32]
    model = converted(source)
    found = model.evaluate({"full": model.space.full}, TEXT, num_tokens=96, context=32)["full"]
    logits = hf_logits(AutoModelForCausalLM.from_pretrained(source).eval(), tokens_BT)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    assert relative_error(torch.tensor(found.loss), loss) <= 1e-5


@pytest.mark.parametrize("case", BEGINNINGS)
@pytest.mark.parametrize("prompt", ["Once upon ", ""])
def test_examples_begin_as_the_tokenizer_begins_a_text_and_chats_as_their_template_does(
    case: str, prompt: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(case)
    tokenizer.chat_template = CHAT
    begin = tokenizer.convert_tokens_to_ids(BEGINNINGS[case])
    end = [tokenizer.eos_token_id]

    def example(record: dict[str, Any]) -> Any:
        (tmp_path / "data").write_text(json.dumps(record))
        return read_dataset(tmp_path / "data", tokenizer, Hyperparameters(), 64).examples[0]

    found = example({"prompt": prompt, "completion": "a time"})
    bare = tokenizer(prompt + "a time", add_special_tokens=False)["input_ids"]
    assert list(found.tokens) == [*begin, *bare, *end]
    # all that begins in the completion is learnt, and the end, but nothing before the first token of all
    starts = tokenizer(prompt + "a time", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    learnt = [False] * len(begin) + [start >= len(prompt) for start, _ in starts] + [True]
    assert [bool(b) for b in found.mask] == [False, *learnt[1:]]
    assert sum(learnt) > 2
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a time"}]
    chat = example({"messages": messages})
    assert list(chat.tokens) == tokenizer.apply_chat_template(messages, return_dict=False)
