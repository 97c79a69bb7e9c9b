"""Adapters of an original and of the checkpoint made from it, against peft on the very checkpoint that each is of."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from flextron.checkpoints.fingerprint import weights_digest
from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.origin import write_origin
from flextron.checkpoints.peft.reading import read_adapter
from flextron.checkpoints.peft.writing import write_adapter
from flextron.checkpoints.weights import load_decoder, write_checkpoint
from flextron.elastic.extract import extract
from flextron.elastic.permute import permute
from flextron.errors import FlextronError
from flextron.files import write_json
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import (
    LAYOUTS,
    hf_config_of,
    hf_logits,
    random_decoder_of,
    random_model,
    relative_error,
    stock,
)
from tests.checkpoints.test_peft import TOKENS, adapted_logits, randomized
from tests.elastic.test_permute import shuffled
from tests.model.adapter_cases import random_lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, so that names of bases may be relative."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def original(case: str, directory: Path) -> Any:
    """A checkpoint, and `transformers`' model that is read from it and so knows its name."""
    random_model(case).save_pretrained(directory)
    return stock(directory)


def elastic(source: Path, directory: Path, *, name: str | None = None) -> Decoder:
    """A permuted checkpoint in a directory, and the decoder that is read from it."""
    pretrained = open_pretrained(source)
    decoder = load_decoder(pretrained)
    digest = weights_digest(pretrained.tensors())
    permute(decoder, shuffled(decoder), source=str(source) if name is None else name, weights=digest)
    directory.mkdir()
    write_checkpoint(decoder, directory, hf_config=pretrained.hf_config, tokenizer=None)
    write_json(directory / "elastic.json", {"layer_scores": [0.1], "provenance": {"source": str(source)}})
    write_origin(directory, decoder.config.origin)
    return load_decoder(open_pretrained(directory))


def ia3_config(case: str) -> IA3Config:
    if case.startswith("gpt2"):
        names, inputs = ["c_attn", "attn.c_proj", "mlp.c_proj"], ["attn.c_proj", "mlp.c_proj"]
    elif case.startswith("neox"):
        names, inputs = ["query_key_value", "dense", "dense_4h_to_h"], ["dense", "dense_4h_to_h"]
    else:
        names, inputs = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], ["o_proj", "down_proj"]
    return IA3Config(
        target_modules=names, feedforward_modules=inputs, fan_in_fan_out=case.startswith("gpt2"), task_type="CAUSAL_LM"
    )


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("method", ["lora", "dora", "outer", "ia3"])
def test_an_adapter_goes_with_the_elastic_checkpoint_whichever_it_was_made_beside(
    case: str, method: str, here: Path
) -> None:
    model = original(case, here / "hf")
    decoder = elastic(here / "hf", here / "e")
    for base, name in ((model, "of-original"), (stock(here / "e"), "of-elastic")):
        more: dict[str, Any] = {"dora": {"use_dora": True}, "outer": {"modules_to_save": ["lm_head"]}}.get(method, {})
        lora = LoraConfig(**LORA, **more, fan_in_fan_out=case.startswith("gpt2"))
        theirs = randomized(get_peft_model(base, ia3_config(case) if method == "ia3" else lora))
        theirs.save_pretrained(here / name)
        ours = adapted_logits(decoder, read_adapter(here / name, decoder))
        assert relative_error(ours, hf_logits(theirs, TOKENS)) <= 1e-5
        assert relative_error(ours, adapted_logits(decoder, None)) > 1e-3


def saved_adapter(base: Any, directory: Path, **changes: Any) -> Any:
    """An adapter beside a model of `transformers`; changes are of its config."""
    theirs = randomized(get_peft_model(base, LoraConfig(**LORA)))
    theirs.save_pretrained(directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return theirs


@pytest.mark.parametrize("source", ["the/hub-id", "hf", "moved"])
@pytest.mark.parametrize("base", ["the/hub-id", "hf", "copy"])
def test_the_original_is_known_by_its_name_or_its_weights(source: str, base: str, here: Path) -> None:
    model = original("llama", here / "hf")
    theirs = saved_adapter(model, here / "a", base_model_name_or_path=base)
    # another precision and one file more: the weights are the same
    stock(here / "hf").save_pretrained(here / "copy", max_shard_size="20KB")
    decoder = elastic(here / "hf", here / "e", name=source)
    if base == "the/hub-id" != source:
        with pytest.raises(FlextronError, match=f"neither.*'{source}' if that was beside it"):
            read_adapter(here / "a", decoder)
        return
    ours = adapted_logits(decoder, read_adapter(here / "a", decoder))
    assert relative_error(ours, hf_logits(theirs, TOKENS)) <= 1e-5


def test_the_elastic_checkpoint_is_known_wherever_it_lies_and_after_training(here: Path) -> None:
    original("llama", here / "hf")
    decoder = elastic(here / "hf", here / "e")
    (here / "e").rename(here / "moved")
    weights = load_file(here / "moved" / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, here / "moved" / "model.safetensors", {"format": "pt"})
    saved_adapter(stock(here / "moved"), here / "a")
    read, kept = read_adapter(here / "a", decoder), load_file(here / "a" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert torch.equal(read.get_parameter("layers.0.down.a").t(), kept[key])


@pytest.mark.parametrize("base", [None, "", "somewhere/else", "other", "other-elastic", "x" * 5000, "a\0b"])
def test_any_other_base_is_refused(base: Any, here: Path) -> None:
    saved_adapter(original("llama", here / "hf"), here / "a", base_model_name_or_path=base)
    random_model("llama", seed=5).save_pretrained(here / "other")
    elastic(here / "other", here / "other-elastic")
    decoder = elastic(here / "hf", here / "e")
    with pytest.raises(FlextronError, match=r"names .* as its base model, which is neither"):
        read_adapter(here / "a", decoder)


def test_an_earlier_checkpoint_without_its_order_takes_only_its_own_adapters(here: Path) -> None:
    model = original("llama", here / "hf")
    elastic(here / "hf", here / "e")
    (here / "e" / "permutation.safetensors").unlink()
    decoder = load_decoder(open_pretrained(here / "e"))
    saved_adapter(model, here / "a")
    with pytest.raises(FlextronError, match="earlier version, does not keep the order"):
        read_adapter(here / "a", decoder)
    theirs = saved_adapter(stock(here / "e"), here / "b")
    ours = adapted_logits(decoder, read_adapter(here / "b", decoder))
    assert relative_error(ours, hf_logits(theirs, TOKENS)) <= 1e-5


def test_what_is_written_here_is_known_again_whatever_its_base_is_called(here: Path) -> None:
    original("llama", here / "hf")
    decoder, adapter = elastic(here / "hf", here / "e"), None
    adapter = random_lora(decoder.config)
    # the name is of the original: written beside the elastic one all the same
    write_adapter(adapter, here / "a", base_model=str(here / "hf"))
    ours = adapted_logits(decoder, read_adapter(here / "a", decoder))
    assert relative_error(ours, adapted_logits(decoder, adapter)) <= 1e-6
    theirs = PeftModel.from_pretrained(stock(here / "e"), here / "a").eval()
    assert relative_error(ours, hf_logits(theirs, TOKENS)) <= 1e-5
    original("llama-linear", here / "other")
    other = elastic(here / "other", here / "other-elastic")
    permute(other, shuffled(other, seed=9), source="other")
    with pytest.raises(FlextronError, match="made beside another elastic checkpoint"):
        read_adapter(here / "a", other)


def test_an_adapter_of_a_shorter_extract_is_refused_by_the_whole(here: Path) -> None:
    original("llama", here / "hf")
    decoder = elastic(here / "hf", here / "e")
    spec = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=40, num_groups=2, skip=[1])
    adapter = random_lora(decoder.config).narrowed(spec)
    write_adapter(adapter, here / "a")
    with pytest.raises(FlextronError, match="or a part of this one"):
        read_adapter(here / "a", decoder)
    back = read_adapter(here / "a", extract(decoder, spec))
    assert torch.equal(back.get_parameter("layers.2.down.a"), adapter.get_parameter("layers.2.down.a"))


def test_a_name_that_was_the_originals_before_is_refused(here: Path) -> None:
    """Converted in place: adapters of both have the same name as their base."""
    original("llama", here / "m")
    elastic(here / "m", here / "e", name="m")
    shutil.rmtree(here / "m")
    (here / "e").rename(here / "m")
    decoder = load_decoder(open_pretrained(here / "m"))
    theirs = saved_adapter(stock(here / "m"), here / "a")
    with pytest.raises(FlextronError, match="where the original was before"):
        read_adapter(here / "a", decoder)
    (here / "m").rename(here / "moved")
    path = here / "a" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(here / "m"), str(here / "moved")))
    ours = adapted_logits(decoder, read_adapter(here / "a", decoder))
    assert relative_error(ours, hf_logits(theirs, TOKENS)) <= 1e-5


@pytest.mark.parametrize("damage", ["truncated", "sizes", "no order"])
def test_a_damaged_order_is_refused(damage: str, here: Path) -> None:
    original("llama", here / "hf")
    elastic(here / "hf", here / "e")
    path = here / "e" / "permutation.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:40])
    else:
        tensors = load_file(path)
        name = "layers.1.neurons"
        tensors[name] = tensors[name][:-1] if damage == "no order" else torch.arange(39, dtype=torch.int32)
        save_file(tensors, path)
    with pytest.raises(FlextronError, match=r"permutation.safetensors.*make the checkpoint again"):
        load_decoder(open_pretrained(here / "e"))


@pytest.mark.parametrize("way", ["pissa", "PiSSA_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new", 3])
def test_what_changes_the_weights_beside_it_is_refused_by_name(way: Any, here: Path) -> None:
    model = original("llama", here / "hf")
    saved_adapter(model, here / "a", init_lora_weights=way)
    with pytest.raises(FlextronError, match=f"init_lora_weights {way!r}, which changes the model's own weights"):
        read_adapter(here / "a", load_decoder(open_pretrained(here / "hf")))


@pytest.mark.parametrize("way", [True, False, "gaussian", "eva", "orthogonal", "mica"])
@pytest.mark.filterwarnings("ignore:.*(is 'eva'|eva initialization):UserWarning")
def test_what_leaves_the_weights_is_read(way: Any, here: Path) -> None:
    config = LoraConfig(**LORA | {"target_modules": ["q_proj", "down_proj"]}, init_lora_weights=way)
    randomized(get_peft_model(original("llama", here / "hf"), config)).save_pretrained(here / "a")
    theirs = PeftModel.from_pretrained(stock(here / "hf"), here / "a").eval()
    decoder = load_decoder(open_pretrained(here / "hf"))
    ours = adapted_logits(decoder, read_adapter(here / "a", decoder))
    assert relative_error(ours, hf_logits(theirs, TOKENS)) <= 1e-5


@pytest.mark.filterwarnings("ignore:PiSSA changes:UserWarning")
def test_a_pissa_adapter_that_peft_converted_is_read(here: Path) -> None:
    model = original("llama", here / "hf")
    peft = get_peft_model(model, LoraConfig(**LORA, init_lora_weights="pissa"))
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(here / "initial")
    peft.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_" in name:
                p.add_(0.05)
    right = hf_logits(peft.eval(), TOKENS)
    peft.save_pretrained(here / "a", path_initial_model_for_weight_conversion=str(here / "initial"))
    decoder = elastic(here / "hf", here / "e")
    ours = adapted_logits(decoder, read_adapter(here / "a", decoder))
    assert relative_error(ours, right) <= 1e-4


@pytest.mark.parametrize("left_over", ["corda_config", "loftq_config", "eva_config", "lora_ga_config"])
def test_settings_of_a_beginning_that_was_not_made_are_passed_over(left_over: str, here: Path) -> None:
    theirs = saved_adapter(original("llama", here / "hf"), here / "a", **{left_over: {"rho": 2.0}})
    decoder = load_decoder(open_pretrained(here / "hf"))
    ours = adapted_logits(decoder, read_adapter(here / "a", decoder))
    assert relative_error(ours, hf_logits(theirs, TOKENS)) <= 1e-5


# settings of peft that the other tests here and in test_peft*.py read, or that change no trained adapter
READ = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules"),
    *("fan_in_fan_out", "feedforward_modules", "inference_mode", "init_ia3_weights", "init_lora_weights"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config"),
    *("megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
    *("target_modules", "task_type", "use_rslora", "use_dora", "modules_to_save", "ensure_weight_tying"),
}
OTHERS = {field.name for config in (LoraConfig, IA3Config) for field in fields(config)} - READ


@pytest.mark.parametrize("setting", sorted(OTHERS))
def test_every_other_setting_of_peft_is_refused_by_name(setting: str, tmp_path: Path) -> None:
    """Those of a newer peft, too: a setting that nobody has looked at may change anything."""
    config = {"peft_type": "LORA", "r": 4, setting: "all" if setting == "bias" else True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FlextronError, match=f"was made with {setting}, which is not supported"):
        read_adapter(tmp_path, random_decoder_of("llama"))


@pytest.mark.parametrize("changes", [{"r": 8}, {"r": 8, "rank_pattern": {"q_proj": 2}}])
def test_a_rank_that_the_config_does_not_say_is_refused(changes: dict[str, Any], here: Path) -> None:
    saved_adapter(original("llama", here / "hf"), here / "a", **changes)
    with pytest.raises(FlextronError, match="has rank 4, its config says"):
        read_adapter(here / "a", load_decoder(open_pretrained(here / "hf")))


def test_digests_are_of_the_matrices(tmp_path: Path) -> None:
    def digest(directory: Path) -> str:
        return weights_digest(open_pretrained(directory).tensors())

    model = random_model("gpt2")
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="10KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path / "c")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(tmp_path / "c")
    shutil.copytree(tmp_path / "a", tmp_path / "d")
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"] *= 1.1
    save_file(tensors, tmp_path / "d" / "model.safetensors", {"format": "pt"})
    assert digest(tmp_path / "d") != digest(tmp_path / "a")
    assert hf_config_of(model)["model_type"] == "gpt2"


def test_a_config_is_enough_where_no_weight_is_compared(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "hf")
    decoder = load_decoder(open_pretrained(tmp_path / "hf"))
    for name, options in (("lora", {}), ("dora", {"use_dora": True})):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
            LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options),
        )
        model.save_pretrained(tmp_path / name)
    wanted, found = read_adapter(tmp_path / "lora", decoder), read_adapter(tmp_path / "lora", decoder.config)
    assert [*found.state_dict()] == [*wanted.state_dict()]
    assert all(torch.equal(found.state_dict()[key], value) for key, value in wanted.state_dict().items())
    with pytest.raises(FlextronError, match="give read_adapter the decoder"):
        read_adapter(tmp_path / "dora", decoder.config)
