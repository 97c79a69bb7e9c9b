"""Texts and prompts of any type: strings and names are taken, everything else gets one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flextron
from flextron import ElasticModel, Engine, FlextronError, TrainRecipe
from flextron.api.packaged import tiny_model
from flextron.api.texts import check_sequences, documents, source_name
from tests.toy import prose

RECIPE = TrainRecipe(tokens=64, context=32, batch_size=2, micro_batch_size=2)

NO_TEXTS: dict[str, Callable[[], Any]] = {
    "a Tensor of ids": lambda: torch.arange(100),
    "lists of ids": lambda: [[1, 2, 3], [4, 5]],
    "tensors": lambda: [torch.arange(3)],
    "an array": lambda: np.arange(10),
    "a number": lambda: 5,
    "bytes": lambda: b"text",
    "a record": lambda: {"text": "once"},
    "records": lambda: [{"text": "once"}],
    "a None among texts": lambda: ["once upon a time", None],
    "bytes among texts": lambda: (t for t in ["once", b"upon"]),
    "half a surrogate pair": lambda: ["once \ud800 upon"],
}


@pytest.fixture(scope="module")
def model() -> ElasticModel:
    return flextron.load(tiny_model())


@pytest.mark.parametrize("kind", NO_TEXTS)
@pytest.mark.parametrize("verb", ["convert", "train", "profile", "route", "route_tokens", "evaluate"])
def test_what_is_no_text_gets_one_sentence(model: ElasticModel, verb: str, kind: str) -> None:
    calls: dict[str, Callable[[Any], object]] = {
        "convert": lambda texts: flextron.convert("tiny", calibration=texts, num_calibration_tokens=64, context=32),
        "train": lambda texts: model.train(texts, RECIPE),
        "profile": lambda texts: model.profile(texts, num_tokens=64, context=32),
        "route": lambda texts: model.route(texts, num_tokens=64, context=32),
        "route_tokens": lambda texts: model.route_tokens(texts, context=32, targets=()),
        "evaluate": lambda texts: model.evaluate({"full": model.space.full}, texts, num_tokens=64, context=32),
    }
    with pytest.raises(FlextronError, match="text") as error:
        calls[verb](NO_TEXTS[kind]())
    assert "\n" not in str(error.value)


def test_names_may_be_paths(model: ElasticModel, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(prose())
    assert list(documents(path, list)) == list(documents(str(path), list)) == [prose()]
    assert source_name(path, "") == str(path)
    specs = {"full": model.space.full}
    found = [model.evaluate(specs, text, num_tokens=64, context=32)["full"].loss for text in (path, str(path))]
    assert found[0] == found[1]


@pytest.mark.parametrize("prompt", [torch.arange(3), [1, 2], b"once", 5, None, ["once"]])
def test_prompts_that_are_no_text(model: ElasticModel, prompt: Any) -> None:
    with pytest.raises(FlextronError, match="a prompt is a string, not"):
        model.generate(prompt, max_tokens=1)
    with pytest.raises(FlextronError, match="a prompt is a string, not"):
        model.extract(model.space.full).generate(prompt, max_tokens=1)


def test_the_engine_takes_lists_of_ids_and_no_tensors(model: ElasticModel) -> None:
    engine = Engine(model, kv_cache_gb=0.01)
    ids = torch.tensor([[5, 6, 7]])
    params = flextron.SamplingParams(max_tokens=2)
    assert engine.generate(ids.tolist(), params)[0].num_prompt_tokens == 3
    assert engine.generate([np.array([5, 6, 7])], params)[0].num_prompt_tokens == 3  # type: ignore[list-item]
    for prompts in (ids, [ids[0]], [["a"]]):
        with pytest.raises(FlextronError, match="texts or lists of token ids"):
            engine.generate(prompts, params)  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_tokens", "context", "named"), [(8, 1, "context"), (8, -1, "context"), (7, 8, "num_tok")])
def test_sequences_that_predict_nothing(num_tokens: int, context: int, named: str) -> None:
    with pytest.raises(FlextronError, match=named):
        check_sequences(num_tokens, context)
    check_sequences(8, 8)
