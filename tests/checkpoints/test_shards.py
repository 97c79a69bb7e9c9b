"""Which files hold the weights, as `transformers` finds them, and that none of them lies elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder
from flextron.errors import FlextronError
from tests.checkpoints.families_cases import hf_logits, our_logits, random_model, random_tokens, relative_error, stock

INDEX = "model.safetensors.index.json"
NAME = "model.embed_tokens.weight"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    random_model("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def index_of(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((path / INDEX).read_text())
    return data


def rename_shard(path: Path, name: str) -> None:
    """Let the index name the first shard otherwise."""
    index = index_of(path)
    first = min(index["weight_map"].values())
    index["weight_map"] = {k: name if v == first else v for k, v in index["weight_map"].items()}
    (path / INDEX).write_text(json.dumps(index))


def refusal(path: Path) -> str:
    with pytest.raises(FlextronError) as caught:
        load_decoder(open_pretrained(path))
    return str(caught.value)


def assert_equal_to(path: Path, seed: int) -> None:
    tokens = random_tokens(1, 10)
    ours = our_logits(load_decoder(open_pretrained(path)), tokens)
    assert relative_error(ours.detach(), hf_logits(random_model("llama", seed), tokens)) <= 1e-5


def test_a_single_file_beside_a_stale_index_without_shards_is_read(sharded: Path) -> None:
    for shard in sharded.glob("*.safetensors"):
        shard.unlink()
    random_model("llama", seed=8).save_pretrained(sharded / "new")
    shutil.move(sharded / "new" / "model.safetensors", sharded)
    assert_equal_to(sharded, seed=8)
    assert torch.equal(
        hf_logits(stock(sharded), random_tokens(1, 5)), hf_logits(random_model("llama", 8), random_tokens(1, 5))
    )


@pytest.mark.parametrize("seed", [3, 8])
def test_a_single_file_and_shards_are_refused_where_they_disagree(sharded: Path, seed: int) -> None:
    random_model("llama", seed).save_pretrained(sharded / "single")
    shutil.move(sharded / "single" / "model.safetensors", sharded)
    if seed == 3:  # the same weights
        assert_equal_to(sharded, seed)
    else:
        assert "shards with other weights; remove what is outdated" in refusal(sharded)


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert_equal_to(tmp_path, seed=3)


def test_a_tensor_is_read_from_the_shard_that_the_index_names(sharded: Path) -> None:
    other = max(v for v in index_of(sharded)["weight_map"].values() if v != index_of(sharded)["weight_map"][NAME])
    tensors = load_file(sharded / other)
    save_file(tensors | {NAME: torch.randn(67, 32)}, sharded / other, metadata={"format": "pt"})
    assert_equal_to(sharded, seed=3)


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    own = index_of(sharded)["weight_map"][NAME]
    tensors = load_file(sharded / own)
    del tensors[NAME]
    save_file(tensors, sharded / own, metadata={"format": "pt"})
    assert f"{own} lacks '{NAME}'" in refusal(sharded)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/other.safetensors", "sub/other.safetensors", ".."])
def test_paths_out_of_the_directory_are_refused(sharded: Path, name: str) -> None:
    (sharded / "sub").mkdir()
    for at in (sharded.parent, sharded / "sub"):
        shutil.copy(min(sharded.glob("*.safetensors")), at / "other.safetensors")
    rename_shard(sharded, name)
    assert "not a file of its directory" in refusal(sharded)


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "x.pt"])
def test_pickled_shards_are_refused(sharded: Path, name: str) -> None:
    (sharded / name).write_bytes(b"x")
    rename_shard(sharded, name)
    assert "no safetensors file" in refusal(sharded)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("absolute", [True, False])
def test_links_out_of_the_directory_are_refused(tmp_path: Path, file: str, absolute: bool) -> None:
    random_model("llama").save_pretrained(tmp_path / "model")
    path, target = tmp_path / "model" / file, tmp_path / file
    target.write_text("{}") if file == "tokenizer.json" else shutil.move(path, target)
    path.symlink_to(target if absolute else Path("..") / file)
    assert f"{file} is a link out of its directory" in refusal(tmp_path / "model")


def test_links_within_the_directory_and_to_it_are_followed(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "weights")
    (tmp_path / "model" / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert_equal_to(tmp_path / "link", seed=3)


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    random_model("llama").save_pretrained(snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    assert_equal_to(snapshot, seed=3)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", INDEX])
def test_pipes_and_devices_are_refused(tmp_path: Path, file: str) -> None:
    random_model("llama").save_pretrained(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / file)
    assert f"{file} is not a regular file" in refusal(tmp_path)


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other", "peft_type": "LORA"}))
    assert "merge it into its base model first" in refusal(tmp_path)
