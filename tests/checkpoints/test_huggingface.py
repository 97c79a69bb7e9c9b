"""Reading checkpoints that are damaged, incomplete or not supported; sharded ones; and directories made in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder, write_checkpoint
from flextron.elastic.extract import extract
from flextron.errors import FlextronError, UnsupportedModelError
from flextron.families.config import FAMILIES
from flextron.files import new_directory, read_json, write_json
from flextron.spec import SubnetSpec
from tests.checkpoints.families_cases import (
    decoder_of,
    hf_config_of,
    hf_logits,
    our_logits,
    random_model,
    random_tokens,
    relative_error,
    stock,
)
from tests.tiny import make_tiny_llama

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved("llama", tmp_path / "llama")


def saved(case: str, path: Path) -> Path:
    random_model(case).save_pretrained(path)
    return path


def edit(path: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite the weights after a change."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def load_error(path: Path) -> str:
    with pytest.raises(FlextronError) as caught:
        load_decoder(open_pretrained(path))
    return str(caught.value)


@pytest.mark.parametrize("case", ["llama", "gpt2", "neox"])
def test_what_transformers_saves_is_read(case: str, tmp_path: Path) -> None:
    model, tokens = random_model(case), random_tokens(1, 10)
    pretrained = open_pretrained(saved(case, tmp_path / case))
    assert pretrained.name == str(tmp_path / case)
    assert pretrained.tokenizer is None
    with torch.no_grad():
        assert relative_error(our_logits(load_decoder(pretrained), tokens), hf_logits(model, tokens)) <= 1e-5


def test_sharded_checkpoints_are_read(tmp_path: Path) -> None:
    model, tokens = random_model("llama"), random_tokens(1, 10)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        ours = our_logits(load_decoder(open_pretrained(tmp_path)), tokens)
    assert relative_error(ours, hf_logits(model, tokens)) <= 1e-5


def test_gpt2_without_prefix_and_with_mask_buffers_is_read(tmp_path: Path) -> None:
    model, tokens = random_model("gpt2"), random_tokens(1, 10)
    path = saved("gpt2", tmp_path / "gpt2")
    bare = {k.removeprefix("transformer."): v for k, v in load_file(path / "model.safetensors").items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(bare, path / "model.safetensors")
    with torch.no_grad():
        ours = our_logits(load_decoder(open_pretrained(path)), tokens)
    assert relative_error(ours, hf_logits(model, tokens)) <= 1e-5


def test_half_precision_weights_are_read_as_asked(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    weights = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    full, low = load_decoder(open_pretrained(llama)), load_decoder(open_pretrained(llama), torch.bfloat16)
    assert (full.dtype, low.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(full.embedding.weight, weights.float())
    assert torch.equal(low.embedding.weight, weights)


@pytest.mark.parametrize("name", ["/no/such/directory", "./nowhere", "no/such/thing/here", "no-such-model"])
def test_missing_directory(name: str) -> None:
    with pytest.raises(FlextronError, match=f"^{name} "):
        open_pretrained(name)


def test_missing_config_and_missing_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert "lacks model.safetensors; download it again" in load_error(llama)
    (llama / "config.json").unlink()
    assert "config.json does not exist" in load_error(llama)


def test_pickled_weights_alone_are_refused(llama: Path) -> None:
    torch.save({}, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    assert "convert its pickled weights to safetensors" in load_error(llama)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in load_error(tmp_path)


def test_malformed_config_is_named(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    assert "config.json is not valid JSON" in load_error(llama)


@pytest.mark.parametrize("keep", [0, 4, 100, -100])
def test_truncated_weights(llama: Path, keep: int) -> None:
    content = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(content[:keep])
    assert "corrupt or truncated" in load_error(llama)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(llama: Path, value: float) -> None:
    edit(llama, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[7:8].fill_(value))
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in load_error(llama)


def test_missing_and_unknown_tensors_are_named(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.pop("model.layers.2.self_attn.k_proj.weight"))
    assert "lacks 1 tensors, first model.layers.2.self_attn.k_proj.weight" in load_error(llama)
    edit(llama, lambda tensors: tensors.update(extra=torch.ones(1)))
    assert "holds extra, which a llama model has no place for" in load_error(llama)


def test_wrong_shape_is_named(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.update({"model.layers.0.mlp.down_proj.weight": torch.ones(32, 44)}))
    message = load_error(llama)
    assert "model.layers.0.mlp.down_proj.weight has shape (32, 44)" in message
    assert "(32, 40)" in message


@pytest.mark.parametrize(("case", "rows"), [("gpt2", 3 * 40), ("gpt2", 4), ("neox", 3 * 40)])
def test_wrong_shape_of_a_fused_tensor(case: str, rows: int, tmp_path: Path) -> None:
    assert "do not belong together" in fused_error(case, rows, saved(case, tmp_path / case))


def test_wrong_shape_of_a_fused_tensor_that_does_not_come_apart(tmp_path: Path) -> None:
    assert "do not belong together" in fused_error("neox", 100, saved("neox", tmp_path / "neox"))


def fused_error(case: str, rows: int, path: Path) -> str:
    """The error with `rows` rows in the first layer's fused query, key and value bias."""
    base = {"gpt2": "transformer.h.0.attn.c_attn", "neox": "gpt_neox.layers.0.attention.query_key_value"}[case]
    edit(path, lambda tensors: tensors.update({f"{base}.bias": torch.ones(rows)}))
    return load_error(path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, []])
def test_index_without_a_weight_map(llama: Path, index: object) -> None:
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json" in load_error(llama)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM"),
        ({"model_type": "mamba"}, "mamba"),
        ({}, "without a model_type"),
    ],
)
def test_unsupported_architecture_is_named_and_the_supported_listed(
    config: dict[str, object], named: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError) as caught:
        open_pretrained(tmp_path)
    assert named in str(caught.value)
    assert ", ".join(FAMILIES) in str(caught.value)


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(["<unk>", "one", "two"])}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def test_tokenizer_goes_along_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model = random_model("llama")
    write_checkpoint(decoder_of(model), tmp_path, hf_config=hf_config_of(model), tokenizer=tokenizer())
    back = open_pretrained(tmp_path).tokenizer
    assert back is not None
    assert back.encode("two one three") == [2, 1, 0]
    stock(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FlextronError, match=r"the tokenizer in .* cannot be read"):
        open_pretrained(tmp_path)


def test_new_directory_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with new_directory(path) as temporary:
        (temporary / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert [p.name for p in path.parent.iterdir()] == ["out"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_inside_leaves_what_was_there(tmp_path: Path, failure: type[BaseException], existing: bool) -> None:
    path = tmp_path / "out"
    if existing:
        path.mkdir()
        (path / "old").write_text("1")

    def fail() -> None:
        with new_directory(path, overwrite=True) as temporary:
            (temporary / "new").write_text("1")
            raise failure

    with pytest.raises(failure):
        fail()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == (["out", "out/old"] if existing else [])


def test_overwriting_swaps_and_is_never_silent(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for name in ("old", "new"):
        with new_directory(path, overwrite=True) as temporary:
            (temporary / name).write_text("1")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["out", "out/new"]
    with pytest.raises(FlextronError, match=r"exists already; .* overwrite"), new_directory(path):
        pass
    assert (path / "new").exists()


def test_a_failing_swap_leaves_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("1")
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if target == path and (source / "new").exists():
            raise OSError("the disk is full")
        replace(source, target)

    # as on a system that cannot exchange two directories in one step
    monkeypatch.setattr("flextron.files._exchange", lambda a, b: False)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="full"), new_directory(path, overwrite=True) as temporary:
        (temporary / "new").write_text("1")
    assert (path / "old").exists()


def test_json_is_written_in_one_step_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ß": [1, 2.5, None]})
    assert read_json(path) == json.loads(path.read_text(encoding="utf-8")) == {"ß": [1, 2.5, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"ß": [1, 2.5, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool])
def test_quantised_weights_are_refused_before_anything_is_computed(llama: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(llama, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert f"{name} is stored as {str(dtype).removeprefix('torch.')}; quantised" in load_error(llama)


def test_an_empty_tensor_is_told_by_its_shape(llama: Path) -> None:
    edit(llama, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.empty(0)}))
    assert "model.embed_tokens.weight has shape (0,) where the config asks for (67, 32)" in load_error(llama)


def test_more_layers_than_tensors_are_refused_at_once(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1000}))
    assert "config.json has 1000 layers, the checkpoint 30 tensors" in load_error(llama)


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    path = saved("gpt2", tmp_path)
    edit(path, lambda tensors: tensors.update({"wte.weight": tensors["transformer.wte.weight"] + 1}))
    assert "holds transformer.wte.weight under two names, with two values" in load_error(path)


def test_a_narrowed_export_has_one_name_for_each_size(tmp_path: Path) -> None:
    model = random_model("gpt2")
    decoder = decoder_of(model)
    spec = SubnetSpec.uniform(num_hidden_layers=3, intermediate_size=24, num_groups=4, skip=(1,))
    config = hf_config_of(model) | {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention"] * 3,
        "intermediate_size": 7,
    }
    write_checkpoint(extract(decoder, spec), tmp_path, hf_config=config, tokenizer=None)
    assert stock(tmp_path).config.num_hidden_layers == 2


def with_tokenizer(path: Path, **settings: object) -> Path:
    """The tiny Llama with a tokenizer, whose `tokenizer_config.json` has other entries."""
    make_tiny_llama(path)
    known = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(known | settings))
    return path


def test_foreign_code_of_a_tokenizer_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    path = with_tokenizer(tmp_path / "model", **code)
    (path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(FlextronError, match="it asks to run code of its own, which this program never does"):
        open_pretrained(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["1", [], None, True, -5])
def test_a_tokenizers_longest_text_is_a_number(tmp_path: Path, value: object) -> None:
    path = with_tokenizer(tmp_path / "model", model_max_length=value)
    if value is None:
        assert open_pretrained(path).tokenizer is not None
        return
    with pytest.raises(FlextronError, match=r"the tokenizer in .* as model_max_length"):
        open_pretrained(path)


@pytest.mark.parametrize(
    "entry", [{"hidden_size": "wide"}, {"vocab_size": -1}, {"rope_parameters": {"rope_theta": []}}]
)
def test_a_bad_config_is_not_told_as_a_bad_tokenizer(tmp_path: Path, entry: dict[str, object]) -> None:
    make_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | entry))
    with pytest.raises(FlextronError, match=r"^config\.json of a llama model is malformed"):
        open_pretrained(tmp_path)


def test_entries_of_a_config_that_no_family_reads_do_not_disturb_the_tokenizer(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": 5, "num_labels": "x"}))
    assert open_pretrained(tmp_path).tokenizer is not None
