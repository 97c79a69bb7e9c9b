"""Adapters on disk against `peft` on stock `transformers` models, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from flextron.checkpoints.peft.reading import read_adapter
from flextron.checkpoints.peft.writing import write_adapter
from flextron.checkpoints.weights import write_checkpoint
from flextron.elastic.extract import extract
from flextron.errors import FlextronError
from flextron.model.batch import Batch
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import (
    LAYOUTS,
    decoder_of,
    hf_config_of,
    hf_logits,
    in_float64,
    random_decoder_of,
    random_model,
    random_tokens,
    relative_error,
    stock,
)
from tests.model.adapter_cases import random_ia3, random_lora, randomize, targets_of

# peft asks transformers under a name that the latter has retired
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TOKENS = random_tokens(2, 12)
FUSED = ("gpt2", "gpt2-rescaled", "neox", "neox-sequential")


def adapted_logits(decoder: Any, adapter: Any, spec: SubnetSpec | None = None) -> torch.Tensor:
    spec = spec or decoder.widths
    batch = Batch.ragged(list(TOKENS), [spec] * 2, adapters=[adapter] * 2)
    return decoder.logits(decoder(batch)).unflatten(0, TOKENS.shape)


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("make", [random_lora, random_ia3])
def test_peft_loads_what_is_written(case: str, make: type, tmp_path: Path) -> None:
    model = random_model(case)
    decoder = decoder_of(model)
    options: dict[str, Any] = {"input_targets": ["down"]} if make is random_ia3 else {}
    adapter = make(decoder.config, **options)
    write_adapter(adapter, tmp_path / "adapter", base_model="base")
    ours = adapted_logits(decoder, adapter)
    theirs = hf_logits(PeftModel.from_pretrained(model, tmp_path / "adapter").eval(), TOKENS)
    assert relative_error(ours, theirs) <= 1e-5
    assert relative_error(ours, adapted_logits(decoder, None)) > 1e-3
    back = read_adapter(tmp_path / "adapter", decoder)
    assert relative_error(adapted_logits(decoder, back), ours) <= 1e-5


@pytest.mark.parametrize("targets", [["q"], ["k", "down"], ["v", "o", "up"]])
@pytest.mark.parametrize("case", ["llama", *FUSED])
def test_peft_loads_part_of_the_linears(case: str, targets: list[str], tmp_path: Path) -> None:
    model = random_model(case)
    decoder = decoder_of(model)
    for k, adapter in enumerate(
        (random_lora(decoder.config, targets=targets), random_ia3(decoder.config, targets=targets, input_targets=()))
    ):
        write_adapter(adapter, tmp_path / str(k))
        theirs = hf_logits(PeftModel.from_pretrained(random_model(case), tmp_path / str(k)).eval(), TOKENS)
        assert relative_error(adapted_logits(decoder, adapter), theirs) <= 1e-5


def randomized(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + float("ia3_" in name))
    return model.eval()


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_wrote_is_read(case: str, rslora: bool, tmp_path: Path) -> None:
    model = in_float64(random_model(case))
    decoder = decoder_of(model)
    last = "layers.1" if case not in FUSED else "(h|layers).1"
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        lora_dropout=0.1,
        use_rslora=rslora,
        target_modules="all-linear",
        rank_pattern={rf"{last}\..*": 2},
        alpha_pattern={rf"{last}\..*": 3},
        task_type="CAUSAL_LM",
        fan_in_fan_out=case.startswith("gpt2"),
    )
    theirs = randomized(get_peft_model(model, config, autocast_adapter_dtype=False))
    theirs.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, decoder)
    assert {t for i in range(3) for t in adapter.at(i)} == set(targets_of(decoder.config))
    assert relative_error(adapted_logits(decoder, adapter.double()), hf_logits(theirs, TOKENS)) <= 1e-12
    # joined again, not stacked
    write_adapter(adapter, tmp_path / "again")
    first, second = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "edit",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ".*q_proj"},
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": "model.layers.0.*"},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 1},
    ],
)
def test_tensors_that_peft_leaves_out_are_refused(edit: dict[str, Any], tmp_path: Path) -> None:
    """As after somebody edited the config: peft passes over what is not a target any more."""
    model = random_model("llama")
    decoder = decoder_of(model)
    model.save_pretrained(tmp_path / "base")
    randomized(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    whole = adapted_logits(decoder, read_adapter(tmp_path, decoder))
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    theirs = PeftModel.from_pretrained(stock(tmp_path / "base"), str(tmp_path))
    assert relative_error(whole, hf_logits(theirs, TOKENS)) > 0.01
    with pytest.raises(FlextronError, match="does not name as a target"):
        read_adapter(tmp_path, decoder)


@pytest.mark.parametrize(
    "targets",
    [r"(?:.*?(?:model|layers).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)", "all-linear", ["layers.0.mlp.up_proj"]],
)
def test_targets_that_people_write_are_taken(targets: Any, tmp_path: Path) -> None:
    model = in_float64(random_model("llama"))
    decoder = decoder_of(model)
    config = LoraConfig(r=4, target_modules=targets)
    theirs = randomized(get_peft_model(model, config, autocast_adapter_dtype=False))
    theirs.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, decoder)
    assert relative_error(adapted_logits(decoder, adapter.double()), hf_logits(theirs, TOKENS)) <= 1e-12


def test_ia3_that_peft_wrote_is_read(tmp_path: Path) -> None:
    model = in_float64(random_model("llama-3"))
    decoder = decoder_of(model)
    names = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    config = IA3Config(**names, task_type="CAUSAL_LM")
    theirs = randomized(get_peft_model(model, config, autocast_adapter_dtype=False))
    theirs.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, decoder)
    assert relative_error(adapted_logits(decoder, adapter.double()), hf_logits(theirs, TOKENS)) <= 1e-12


def test_a_narrowed_adapter_goes_with_its_extracted_checkpoint(tmp_path: Path) -> None:
    model = random_model("llama")
    decoder = decoder_of(model)
    adapter = random_lora(decoder.config)
    spec = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=24, num_groups=1, skip=[1])
    (tmp_path / "base").mkdir()
    write_checkpoint(extract(decoder, spec), tmp_path / "base", hf_config=hf_config_of(model), tokenizer=None)
    write_adapter(adapter.narrowed(spec), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(stock(tmp_path / "base"), tmp_path / "adapter").eval()
    assert relative_error(adapted_logits(decoder, adapter, spec), hf_logits(theirs, TOKENS)) <= 1e-5


@pytest.mark.parametrize("case", ["llama-3", "gpt2"])
def test_gradients_equal_those_of_peft(case: str, tmp_path: Path) -> None:
    model = in_float64(random_model(case))
    decoder = decoder_of(model).requires_grad_(False)
    adapter = random_lora(decoder.config, targets=["o", "up", "down"]).double()
    write_adapter(adapter, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True, autocast_adapter_dtype=False)
    weights = torch.randn(*TOKENS.shape, 67, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (adapted_logits(decoder, adapter) * weights).sum().backward()
    (theirs(TOKENS, use_cache=False).logits * weights).sum().backward()
    for p in adapter.parameters():
        p.data = p.grad if p.grad is not None else torch.zeros_like(p)
    write_adapter(adapter, tmp_path / "gradients")
    ours = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    reference = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert ours.keys() == reference.keys()
    for name, gradient in reference.items():
        assert relative_error(ours[name], gradient) <= 1e-12, name


def _edited(directory: Path, **changes: Any) -> Path:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_bad_directories_are_refused(tmp_path: Path) -> None:
    decoder = random_decoder_of("llama")
    adapter = randomize(random_lora(decoder.config))
    good = tmp_path / "good"
    with pytest.raises(FlextronError, match="does not exist"):
        read_adapter(good, decoder)
    write_adapter(adapter, good)
    with pytest.raises(FlextronError, match="exists already"):
        write_adapter(adapter, good)
    with pytest.raises(FlextronError, match=r"trainable_token_indices, which is not.*merge_and_unload"):
        read_adapter(_edited(good, trainable_token_indices=[1]), decoder)
    with pytest.raises(FlextronError, match="LORA, IA3"):
        read_adapter(_edited(good, trainable_token_indices=None, peft_type="VERA"), decoder)
    _edited(good, peft_type="LORA")
    narrow = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=24, num_groups=1)
    with pytest.raises(FlextronError, match="another checkpoint"):
        read_adapter(good, extract(decoder, narrow))
    with pytest.raises(FlextronError, match="has no place beside"):
        read_adapter(good, random_decoder_of("gpt2"))
    weights = good / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[min(tensors)][0, 0] = torch.nan
    save_file(tensors, weights)
    with pytest.raises(FlextronError, match="NaN"):
        read_adapter(good, decoder)
    weights.write_bytes(b"short")
    with pytest.raises(FlextronError, match="missing or damaged"):
        read_adapter(good, decoder)
