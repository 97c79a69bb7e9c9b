"""Log-probabilities of prompts over HTTP, against a pass over the whole prompt, and lm-eval's own client."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch

from flextron import ElasticModel
from flextron.model.attention import CausalAttention
from flextron.model.batch import Batch
from tests.server.running import Running
from tests.server.test_refusals import assert_refused

TEXT = "In 1998 the city was not there, it said."


def post(server: Running, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "tiny@0.6", **body}, timeout=60)


def whole_pass(model: ElasticModel, ids: list[int]) -> torch.Tensor:
    spec = model.select(latency=0.6)
    batch = Batch.ragged([torch.tensor(ids)], [spec], [0], [None])
    with torch.inference_mode():
        return model.decoder.logits(model.decoder(batch, CausalAttention(model.decoder.config))).log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_with_logprobs(server: Running, model: ElasticModel, max_tokens: int, stream: bool, as_ids: bool) -> None:
    tokenizer = server.service.tokenizer
    ids = tokenizer.encode(TEXT)
    options: Any = {"prompt": ids if as_ids else TEXT, "max_tokens": max_tokens, "temperature": 0}
    client = server.client()
    if stream:
        pieces = [
            c.choices[0]
            for c in client.completions.create(model="tiny@0.6", echo=True, logprobs=2, stream=True, **options)
        ]
        text = "".join(p.text for p in pieces)
        parts = [p.logprobs for p in pieces if p.logprobs is not None]
        tokens, values, top, offsets = (
            [x for p in parts for x in getattr(p, name) or []]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        )
    else:
        choice = client.completions.create(model="tiny@0.6", echo=True, logprobs=2, **options).choices[0]
        found: Any = choice.logprobs
        text, tokens, values = choice.text, found.tokens, found.token_logprobs
        top, offsets = found.top_logprobs, found.text_offset
    plain = client.completions.create(model="tiny@0.6", **options | {"max_tokens": max_tokens or 1}).choices[0].text
    assert text == TEXT + (plain if max_tokens else "")
    assert len(tokens) == len(values) == len(top) == len(offsets) == len(ids) + max_tokens
    wanted = whole_pass(model, ids)
    assert values[0] is None
    assert top[0] is None
    rows = torch.arange(len(ids) - 1)
    assert values[1 : len(ids)] == pytest.approx(wanted[rows, ids[1:]].tolist(), abs=1e-4)
    for row, best in zip(wanted, top[1 : len(ids)], strict=False):
        assert list(best.values()) == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    ends = [*offsets[1:], len(text)]
    assert "".join(text[a:b] for a, b in zip(offsets, ends, strict=True)) == text
    assert [text[a:b] for a, b in zip(offsets, ends, strict=True)] == tokens


def test_vllms_keys(server: Running, chat_server: Running, model: ElasticModel) -> None:
    ids = server.service.tokenizer.encode(TEXT)
    wanted = whole_pass(model, ids)
    keys = {"prompt_logprobs": 1, "return_token_ids": True, "max_tokens": 2, "temperature": 0}
    choice = post(server, prompt=[TEXT, "In"], **keys).json()["choices"][0]
    assert choice["prompt_token_ids"] == ids
    assert len(choice["token_ids"]) == 2
    assert choice["prompt_logprobs"][0] is None
    for row, token, entries in zip(wanted, ids[1:], choice["prompt_logprobs"][1:], strict=False):
        own = entries[str(token)]
        assert own["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        assert own["rank"] == int((row > row[token]).sum()) + 1
        assert entries[str(int(row.argmax()))]["rank"] == 1
    messages = [{"role": "user", "content": "a"}]
    chat = post(chat_server, "/v1/chat/completions", messages=messages, **keys).json()
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
    assert len(chat["choices"][0]["token_ids"]) == 2


@pytest.mark.parametrize("num_before", [0, 2])
def test_an_end_has_an_entry_beside_an_echo(server: Running, model: ElasticModel, num_before: int) -> None:
    """lm-eval asks for one token and takes all entries but the last for the prompt's, also where that is an end."""
    ids, end = server.service.tokenizer.encode(TEXT), server.service.tokenizer.eos_token_id
    options: dict[str, Any] = {"prompt": ids, "temperature": 0, "echo": True, "logprobs": 1, "max_tokens": 9}
    forced = {"logit_bias": {str(end): 100}, "min_tokens": num_before}
    answer = post(server, **options, **forced).json()
    (choice,) = answer["choices"]
    entries, count = choice["logprobs"], len(ids) + num_before
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", num_before)
    assert {len(found) for found in entries.values()} == {count + 1}
    assert entries["text_offset"][-1] == len(choice["text"])
    answered = post(server, **options | {"max_tokens": 9, "return_token_ids": True}, **forced).json()["choices"][0]
    scores_TV = whole_pass(model, ids + answered["token_ids"])
    assert entries["token_logprobs"][-1] == pytest.approx(float(scores_TV[-1, end]), abs=1e-4)
    assert entries["token_logprobs"][len(ids) - 1] == pytest.approx(float(scores_TV[len(ids) - 2, ids[-1]]), abs=1e-4)
    without = post(server, **options | {"echo": False}, **forced).json()["choices"][0]["logprobs"]
    assert len(without["tokens"]) == num_before


def test_tokens_over_http(chat_server: Running) -> None:
    tokenizer = chat_server.service.tokenizer
    found = post(chat_server, "/tokenize", prompt=TEXT, return_token_strs=True).json()
    assert found["tokens"] == tokenizer.encode(TEXT)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert post(chat_server, "/detokenize", tokens=found["tokens"]).json() == {"prompt": TEXT}
    chat = post(chat_server, "/tokenize", messages=[{"role": "user", "content": "a"}]).json()
    assert tokenizer.decode(chat["tokens"]) == "user: a\nassistant:"
    assert_refused(post(chat_server, "/tokenize"), 400, "one of them")
    assert_refused(post(chat_server, "/detokenize", tokens=[99999]), 400, "vocabulary")
    info = httpx.get(f"{chat_server.url}/tokenizer_info").json()
    assert info["eos_token"] == tokenizer.eos_token
    assert info["chat_template"] == tokenizer.chat_template
    assert httpx.get(f"{chat_server.url}/ping").status_code == 200
    assert httpx.get(f"{chat_server.url}/version").json()["version"]


def test_cached_tokens_are_told(server: Running) -> None:
    prompt = "The first of all cities by the sea was said to be old. " * 4
    first, second = (post(server, prompt=prompt, max_tokens=1).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == (second["prompt_tokens"] - 1) // 16 * 16
