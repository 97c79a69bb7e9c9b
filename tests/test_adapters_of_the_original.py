"""Adapters of a checkpoint and of the elastic one made from it: engine, server and finetuning against peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import flextron
from flextron import ElasticModel, Engine, SamplingParams
from flextron.checkpoints.permutation import Permutation
from flextron.errors import FlextronError
from flextron.server.startup import named_adapters
from tests.checkpoints.test_peft import randomized
from tests.server.running import running
from tests.tiny import make_tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PROMPT = [5, 9, 33, 40, 7, 61]
PARAMS = SamplingParams(max_tokens=8, stop_token_ids=(-1,))
TEXT = ["Once upon a time a small model learned to be smaller still. " * 9] * 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original `hf`, the elastic checkpoint `elastic`, and an adapter of each."""
    path = tmp_path_factory.mktemp("adapters")
    make_tiny_llama(path / "hf")
    model = flextron.convert(path / "hf", calibration=TEXT, num_calibration_tokens=128, context=32)
    model.save(path / "elastic")
    for base in ("hf", "elastic"):
        config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        stock = AutoModelForCausalLM.from_pretrained(path / base)
        randomized(get_peft_model(stock, config)).save_pretrained(path / f"of-{base}")
    return path


@pytest.fixture(scope="module")
def model(root: Path) -> ElasticModel:
    return flextron.load(root / "elastic")


@torch.no_grad()
def greedy(base: Path, adapter: Path) -> tuple[int, ...]:
    """What peft's model answers, token by token."""
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    tokens = list(PROMPT)
    for _ in range(PARAMS.max_tokens):
        tokens.append(int(theirs(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tuple(tokens[len(PROMPT) :])


@pytest.mark.parametrize("base", ["hf", "elastic"])
def test_engine_and_server_answer_as_peft_does_beside_the_base(base: str, root: Path, model: ElasticModel) -> None:
    right = greedy(root / base, root / f"of-{base}")
    (plain,) = Engine(model, kv_cache_gb=0.01).generate([PROMPT], PARAMS)
    assert plain.token_ids != right
    (got,) = Engine(model, kv_cache_gb=0.01).generate([PROMPT], PARAMS, adapter=root / f"of-{base}")
    assert got.token_ids == right
    adapters = named_adapters(model, [f"mine={root / f'of-{base}'}"])
    with running(model, {"kv_cache_gb": 0.01}, adapters=adapters) as server:
        said = server.client().completions.create(
            model="mine", prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
    assert model.tokenizer is not None
    assert said.choices[0].text.strip() == str(model.tokenizer.decode(list(right), skip_special_tokens=True)).strip()


def test_an_adapter_of_another_model_is_refused_when_the_server_starts(root: Path, model: ElasticModel) -> None:
    config = json.loads((root / "of-hf" / "adapter_config.json").read_text())
    other = root / "of-another"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/other"}))
    (other / "adapter_model.safetensors").symlink_to(root / "of-hf" / "adapter_model.safetensors")
    with pytest.raises(FlextronError, match="names 'some/other' as its base model, which is neither"):
        named_adapters(model, [f"mine={other}"])


@pytest.mark.parametrize("is_loaded", [True, False])
def test_what_finetune_makes_is_of_the_elastic_checkpoint(is_loaded: bool, root: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "Once ", "completion": "upon a time"}) + "\n")
    used: Any = root / "elastic"
    if not is_loaded:
        used = flextron.convert(root / "hf", calibration=TEXT, num_calibration_tokens=128, context=32)
    flextron.finetune(used, data, tmp_path / "adapter", n_epochs=8, rank=2, learning_rate=0.05)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (str(root / "elastic") if is_loaded else "")
    # the same prompt through stock transformers on the elastic checkpoint
    right = greedy(root / "elastic", tmp_path / "adapter")
    (got,) = Engine(used, kv_cache_gb=0.01).generate([PROMPT], PARAMS, adapter=tmp_path / "adapter")
    assert got.token_ids == right


def test_the_order_is_kept_with_the_checkpoint_and_its_source(root: Path, model: ElasticModel) -> None:
    with safe_open(root / "elastic" / "permutation.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        assert file.metadata()["source"] == str(root / "hf")
    kept = Permutation.from_tensors(tensors)
    original = flextron.convert(root / "hf", calibration=TEXT, num_calibration_tokens=128, context=32)
    up = "model.layers.1.mlp.up_proj.weight"
    before = AutoModelForCausalLM.from_pretrained(root / "hf").state_dict()[up]
    after = AutoModelForCausalLM.from_pretrained(root / "elastic").state_dict()[up]
    assert torch.equal(after, before[kept.neurons[1]])
    assert not torch.equal(after, before)
    # converted again, trained or saved again, it is the same
    model.save(root / "again")
    again = flextron.load(root / "again")
    marks = {getattr(m.decoder.config.origin, "mark", None) for m in (original, model, again)}
    assert len(marks) == 1
    assert None not in marks
