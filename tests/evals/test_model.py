"""The model type: likelihoods and answers of the full network are those of lm-eval's own `hf` type."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from flextron import ElasticModel, api
from flextron.errors import FlextronError
from flextron.evals.model import FlextronLM
from tests.tiny import make_tiny_llama

WORDS = ["once", "upon", "a", "time", "a", "small", "model", "learned", "to", "be", "smaller", "still"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last or add_generation_prompt %}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a template, and a tokenizer that begins each text."""
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ElasticModel:
    return api.convert(checkpoint, calibration=[" ".join(WORDS) * 80], num_calibration_tokens=512, context=64)


@pytest.fixture(scope="module")
def hf(checkpoint: Path) -> HFLM:
    return HFLM(pretrained=str(checkpoint), dtype="float32", batch_size=4, device="cpu")


def requests(kind: str, *args: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(args)]


def test_likelihoods_are_those_of_hf(model: ElasticModel, hf: HFLM) -> None:
    draw = random.Random(0)
    asked = []
    # no context, spaces at its end, BOS as text, and more tokens than the model has positions
    for context in ("", "once ", "<s>once upon", *(" ".join(draw.choices(WORDS, k=k)) for k in (1, 9, 40, 300))):
        asked += [(context, " " + " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))) for _ in range(4)]
    given = requests("loglikelihood", *asked)
    own, expected = FlextronLM(model, batch_size=5).loglikelihood(given), hf.loglikelihood(given, disable_tqdm=True)
    assert [value for value, _ in own] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in expected]


def test_rolling_likelihoods_are_those_of_hf(model: ElasticModel, hf: HFLM) -> None:
    draw = random.Random(1)
    given = requests("loglikelihood_rolling", *((" ".join(draw.choices(WORDS, k=k)),) for k in (2, 60, 400)))
    expected = hf.loglikelihood_rolling(given, disable_tqdm=True)
    assert FlextronLM(model).loglikelihood_rolling(given) == pytest.approx(expected, rel=1e-5)


def test_answers_are_those_of_hf(model: ElasticModel, hf: HFLM) -> None:
    options = {"until": ["to", "\n"], "max_gen_toks": 12, "do_sample": False}
    contexts = ["once upon", "a", "small model learned to be", " ".join(WORDS * 12)]
    given = requests("generate_until", *((text, dict(options)) for text in contexts))
    given += requests("generate_until", ("still", {"max_gen_toks": 5}), ("", {"until": "e", "max_tokens": 3}))
    # one at a time: hf pads on the left
    expected = [hf.generate_until([one], disable_tqdm=True)[0] for one in given[:-1]]
    own = FlextronLM(model, batch_size=2).generate_until(given)
    assert own[:-1] == expected
    assert len({*own}) > 2


def test_the_template_is_the_models_own(model: ElasticModel, hf: HFLM) -> None:
    lm = FlextronLM(model)
    chat = [{"role": "user", "content": "once?"}, {"role": "assistant", "content": "upon"}]
    for history, is_begun in ((chat[:1], False), (chat, True)):
        text = lm.apply_chat_template(history, add_generation_prompt=not is_begun)
        assert text == hf.apply_chat_template(history, add_generation_prompt=not is_begun)
    assert text.endswith("upon")
    assert lm.chat_template(True) == TEMPLATE


def test_another_sub_network_scores_otherwise(model: ElasticModel) -> None:
    given = requests("loglikelihood", ("once upon", " a time"))
    full, smallest = FlextronLM(model), FlextronLM(model, spec=model.space.smallest)
    assert full.loglikelihood(given) != smallest.loglikelihood(given)
    info = smallest.get_model_info()
    assert info["model_num_parameters"] == model.num_parameters(model.space.smallest)


def test_it_is_registered(model: ElasticModel, tmp_path: Path) -> None:
    assert get_model("flextron") is FlextronLM
    model.save(tmp_path / "elastic")
    lm = FlextronLM.create_from_arg_obj({"pretrained": str(tmp_path / "elastic")}, {"batch_size": "3", "device": "cpu"})
    assert (lm.batch_size, lm.spec) == (3, model.space.full)


@pytest.mark.parametrize("batch_size", [0, "auto", -1])
def test_bad_batch_sizes(model: ElasticModel, batch_size: int | str) -> None:
    with pytest.raises(FlextronError, match="batch_size"):
        FlextronLM(model, batch_size=batch_size)


def test_what_cannot_be_asked(model: ElasticModel) -> None:
    lm = FlextronLM(model)
    with pytest.raises(FlextronError, match="top_k"):
        lm.generate_until(requests("generate_until", ("a", {"top_k": 5})))
    with pytest.raises(FlextronError, match="max_gen_toks"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 256})))
    with pytest.raises(FlextronError, match="leave the task out"):
        lm.loglikelihood(requests("loglikelihood", ("a", " once" * 400)))
    lm.tokenizer = AutoTokenizer.from_pretrained(lm.tokenizer.name_or_path)
    lm.tokenizer.chat_template = None
    with pytest.raises(FlextronError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "a"}])
