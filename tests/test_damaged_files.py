"""Files that are damaged at random: read, or refused in one sentence; no traceback, no hang, no absurd allocation."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import flextron
from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.peft.config import check_adapter_config
from flextron.checkpoints.peft.reading import read_adapter
from flextron.checkpoints.peft.writing import write_adapter
from flextron.checkpoints.shards import find_shards
from flextron.checkpoints.weights import load_decoder
from flextron.elastic.checkpoint import read_elastic
from flextron.families.config import config_from_hf
from flextron.files import read_json
from flextron.model.adapter import Adapter
from flextron.model.bypass import Lora
from flextron.routing import Frontier, LatencyTable, StaticRouter
from flextron.routing.sensitivity import Sensitivity
from flextron.routing.token_router import TokenRouter
from flextron.spec import SearchSpace, SubnetSpec
from flextron.training.state import RunDirectory
from flextron.workflows.elastify import ElastifyRecipe, read_recipe
from flextron.workflows.report import frontier_rows, summary
from tests.checkpoints.families_cases import CASES, hf_config_of, random_decoder_of, random_model
from tests.damage import Watch, damaged, damaged_bytes, little_memory, written
from tests.gguf.writing import fields_of, to_gguf, write_gguf
from tests.tiny import make_tiny_llama
from tests.token_toy import opinionated_router
from tests.toy import SPACE, TABLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")

Reader = Callable[[Any], object]
BYTES_TOO = (".json", ".safetensors")


def frontier() -> dict[str, Any]:
    points = [
        {"spec": SPACE.uniform(w, 2).to_dict(), "kind": "uniform", "params": w * 10, "mem_bytes": w * 40,
         "kv_bytes_per_token": 8, "latency_ms": float(w), "latency": w / 40, "loss": 4 - w / 40}
        for w in (40, 24, 8)
    ]  # fmt: skip
    return {"device": "toy", "text": "toy", "points": points}


def documents() -> dict[str, tuple[Any, Reader]]:
    """By format: a document, and what reads it from memory."""
    router = opinionated_router()
    tensors = router.state_dict()
    table = json.loads(json.dumps(TABLE.to_dict()))
    costs = [{"0": 0.5, "8": 0.25, "40": 0.0}] * 3
    configs = {f"config {case}": (hf_config_of(random_model(case)), config_from_hf) for case in CASES}
    older = hf_config_of(random_model("llama")) | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4}
    return configs | {
        "config older": ({k: v for k, v in older.items() if k != "rope_parameters"}, config_from_hf),
        "search space": (SPACE.to_dict(), SearchSpace.from_dict),
        "spec": (SPACE.full.to_dict(), SubnetSpec.from_dict),
        "frontier": (frontier(), lambda data: Frontier.from_dict(data).best()),
        "latency table": (table, lambda data: LatencyTable.from_dict(data).name),
        "sensitivity": ({"mlp": costs, "attention": costs}, Sensitivity.from_dict),
        "token router": (
            json.loads(json.dumps(router.to_dict())),
            lambda data: TokenRouter.from_dict(data, tensors).prices,
        ),
        "adapter config": (
            {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_rslora": False, "rank_pattern": {},
             "alpha_pattern": {"q_proj": 4, r"layers\.(1|2)\.k_proj": 2.0}, "target_modules": ["q_proj"]},
            lambda data: check_adapter_config(data, "adapter_config.json"),
        ),
    }  # fmt: skip


def file_documents(directory: Path) -> dict[str, tuple[Path, bytes, Reader]]:
    """By format: a file, its content, and what reads it; for readers that take paths."""
    random_model("llama").save_pretrained(directory / "sharded", max_shard_size="20KB")
    index = directory / "sharded" / "model.safetensors.index.json"
    elastic = {
        "format_version": 1, "search_space": SPACE.to_dict(), "layer_scores": [1.0, 0.5, 0.2],
        "provenance": {"source": "x", "elastify": {"source": "y"}}, "recipe": {"num_tokens": 5},
    }  # fmt: skip
    (directory / "elastic.json").write_bytes(written(elastic))
    recipe = ElastifyRecipe(source="a", output="b").model_dump(mode="json")
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    run = RunDirectory(directory / "run", {"a": 1})
    run.save(2, dict(model.named_parameters()), optimizer, [{"loss": 1.0}])
    state = directory / "run" / "state"

    def resume(_: Path) -> None:
        run.load(dict(model.named_parameters()), torch.optim.AdamW(model.parameters()))

    readers: dict[str, tuple[Path, Reader]] = {
        "index": (index, lambda path: find_shards(path.parent)),
        "elastic": (directory / "elastic.json", lambda path: read_elastic(path.parent)),
        "recipe": (directory / "recipe.yaml", read_recipe),
        "state": (state / "run.json", resume),
        "state tensors": (next(state.glob("*.safetensors")), resume),
        "any JSON": (directory / "any.json", read_json),
    }
    (directory / "any.json").write_bytes(written(frontier()))
    return {name: (path, path.read_bytes(), reader) for name, (path, reader) in readers.items()}


def attack_documents(watch: Watch, rng: random.Random, num_inputs: int) -> None:
    formats = documents()
    for i in range(num_inputs):
        name, (document, reader) = list(formats.items())[i % len(formats)]
        broken = damaged(rng, document)
        watch.read(name, reader, broken, broken)


def attack_files(watch: Watch, rng: random.Random, num_inputs: int, directory: Path) -> None:
    formats = file_documents(directory)
    for i in range(num_inputs):
        name, (path, content, reader) = list(formats.items())[i % len(formats)]
        if path.suffix == ".json" and rng.random() < 0.6:
            broken = written(damaged(rng, json.loads(content)))
        elif path.suffix == ".yaml" and rng.random() < 0.6:
            broken = written(damaged(rng, yaml.safe_load(content)))
        else:
            broken = damaged_bytes(rng, content)
        path.write_bytes(broken)
        watch.read(name, reader, path, broken[:400])
        path.write_bytes(content)


def load_and_generate(directory: Path) -> None:
    model = flextron.load(directory)
    summary(model)
    frontier_rows(model)
    if model.frontier is not None:
        model.select(params=10**9)
    if model.token_router is not None:
        model.token_router.at(0.7, 1.0)
    model.generate("Once", max_tokens=2)


def attack_checkpoints(watch: Watch, rng: random.Random, num_inputs: int, whole: Path) -> None:
    """One damaged file in an elastic checkpoint, which is then loaded and writes two tokens."""
    files = [p for p in sorted(whole.rglob("*")) if p.suffix in BYTES_TOO]
    for i in range(num_inputs):
        path = files[i % len(files)]
        content = path.read_bytes()
        is_json = path.suffix == ".json"
        broken = written(damaged(rng, json.loads(content))) if is_json and rng.random() < 0.7 else None
        path.write_bytes(broken := damaged_bytes(rng, content) if broken is None else broken)
        watch.read(path.name, load_and_generate, whole, broken[:400])
        path.write_bytes(content)


def attack_adapters(watch: Watch, rng: random.Random, num_inputs: int, directory: Path) -> None:
    decoder = random_decoder_of("llama")
    adapter = Adapter(
        decoder.config, decoder.widths, lambda i, target, shape: Lora(shape, 2, 2.0) if target == "q" else None
    )
    write_adapter(adapter, directory)
    for i in range(num_inputs):
        path = sorted(directory.iterdir())[i % 2]
        content = path.read_bytes()
        is_json = path.suffix == ".json" and rng.random() < 0.8
        broken = written(damaged(rng, json.loads(content))) if is_json else damaged_bytes(rng, content)
        path.write_bytes(broken)
        watch.read(path.name, partial(read_adapter, decoder=decoder), directory, broken[:400])
        path.write_bytes(content)


def load_gguf(path: Path) -> None:
    load_decoder(open_pretrained(path))


def attack_gguf(watch: Watch, rng: random.Random, num_inputs: int, directory: Path) -> None:
    """Changed metadata, and changed bytes."""
    model = random_model("llama")
    fields = fields_of(model.config)
    arrays = to_gguf(model.state_dict(), model.config)
    content = write_gguf(directory / "whole.gguf", "llama", fields, arrays).read_bytes()
    path = directory / "broken.gguf"
    for _ in range(num_inputs):
        if rng.random() < 0.5:
            changed = dict(fields)
            key = rng.choice(sorted(changed))
            changed[key] = rng.choice((0, 1, 3, 10**6, 2**32 - 1, 0.0, 1e30, float("nan"), "x", True, [1, 2]))
            write_gguf(path, "llama", changed, arrays)
            shown = f"{key} = {changed[key]}"
        else:
            path.write_bytes(damaged_bytes(rng, content))
            shown = "bytes"
        watch.read("gguf", load_gguf, path, shown)


@pytest.fixture
def elastic(tmp_path: Path) -> Path:
    make_tiny_llama(tmp_path / "tiny-llama")
    text = ["The quick brown fox jumps over the lazy dog. " * 40]
    model = flextron.convert(tmp_path / "tiny-llama", calibration=text, num_calibration_tokens=256, context=64)
    space = model.space
    costs = {
        "mlp_ms": dict.fromkeys(space.intermediate_sizes, 1.0),
        "attention_ms": dict.fromkeys(space.num_groups, 1.0),
    }
    table = replace(TABLE, **costs)
    model.tables[table.name] = table
    points = [p | {"spec": space.full.to_dict()} for p in frontier()["points"]]
    model.frontier = Frontier.from_dict(frontier() | {"points": points})
    model.router = StaticRouter(space, 8)
    model.token_router = TokenRouter.for_table(space, model.decoder.config.hidden_size, table, num_units=4)
    model.token_router.prices, model.token_router.specs = {0.5: 1.0, 0.9: 0.5}, {0.5: space.full, 0.9: space.full}
    model.save(tmp_path / "elastic")
    return tmp_path / "elastic"


@pytest.fixture
def watch() -> Iterator[Watch]:
    found = Watch()
    with little_memory():
        yield found
    inputs, refused = (sum(c[k] for c in found.counts.values()) for k in (0, 1))
    print(f"{inputs} inputs, {refused} refused: {found.counts}")  # noqa: T201
    assert not found.faults, "\n".join(found.faults)


def test_damaged_documents(watch: Watch) -> None:
    attack_documents(watch, random.Random(0), 2500)


def test_damaged_files(watch: Watch, tmp_path: Path) -> None:
    attack_files(watch, random.Random(0), 400, tmp_path)
    attack_adapters(watch, random.Random(0), 100, tmp_path / "adapter")


def test_damaged_checkpoints(elastic: Path, watch: Watch) -> None:
    attack_checkpoints(watch, random.Random(0), 60, elastic)


@pytest.mark.slow
def test_damaged_gguf_files(tmp_path: Path, watch: Watch) -> None:
    attack_gguf(watch, random.Random(0), 500, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
def test_fifty_thousand_damaged_inputs(seed: int, tmp_path: Path, elastic: Path, watch: Watch) -> None:
    rng = random.Random(seed)
    attack_documents(watch, rng, 18_500)
    attack_files(watch, rng, 4500, tmp_path)
    attack_adapters(watch, rng, 1500, tmp_path / "adapter")
    attack_checkpoints(watch, rng, 700, elastic)
    assert sum(count[0] for count in watch.counts.values()) >= 25_000
