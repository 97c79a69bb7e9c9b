"""What goes wrong with texts, search spaces, tables and disks: one sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from flextron.elastic import checkpoint as elastic_checkpoint
from flextron.routing import latency as latency_module
from tests.cli import test_cli
from tests.cli.test_cli import TRAIN, Places, assert_refused
from tests.toy import synthetic_latencies

made, run = test_cli.made, test_cli.run

VERBS: dict[str, tuple[str, ...]] = {
    "train": (*TRAIN, "--data"),
    "profile": ("--text",),
    "route": ("--text",),
    "route --token": ("--text",),
    "eval": ("--text",),
}


def noise(num_bytes: int = 4096) -> bytes:
    return b"\x00\xff" + random.Random(0).randbytes(num_bytes)


SOURCES: dict[str, Callable[[Path], Path]] = {}


def source(make: Callable[[Path], object], name: str) -> None:
    def write(directory: Path) -> Path:
        path = directory / name
        make(path)
        return path

    SOURCES[name] = write


source(lambda path: path.write_bytes(b""), "empty.txt")
source(lambda path: path.write_bytes(b""), "empty.jsonl")
source(lambda path: path.write_bytes(b""), "empty.parquet")
source(lambda path: path.write_bytes(b""), "empty.jsonl.zst")
source(lambda path: path.write_text(" \n\n"), "blank.txt")
source(lambda path: path.write_text('{"text": ""}\n{"text": null}\n'), "no-words.jsonl")
source(lambda path: path.write_text('{"id": 1, "label": 2}\n'), "no-text.jsonl")
source(lambda path: path.write_bytes(noise()), "binary.txt")
source(lambda path: path.write_bytes(noise()), "binary.jsonl")
source(lambda path: path.write_bytes(noise()), "binary.parquet")
source(lambda path: path.write_bytes(noise()), "binary.txt.zst")
source(lambda path: path.write_bytes(noise()), "binary.bin")
source(lambda path: path.mkdir(), "empty-directory")


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module, "step_latencies_ms", synthetic_latencies)


@pytest.fixture
def elastic(made: Places, tmp_path: Path) -> Path:
    """A profiled checkpoint that may be changed."""
    return Path(shutil.copytree(made.profiled, tmp_path / "elastic"))


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("name", sorted(SOURCES))
def test_text_that_is_none_is_refused_and_nothing_changes(run: Any, elastic: Path, name: str, tmp_path: Path) -> None:
    path, before = SOURCES[name](tmp_path), content(elastic)
    for verb, options in VERBS.items():
        verb, *flags = verb.split()
        assert_refused(run(verb, elastic, *flags, *options, path))
    assert content(elastic) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"elastic", path.name})


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_calibration_text_that_is_none_leaves_no_checkpoint(run: Any, made: Places, name: str, tmp_path: Path) -> None:
    path = SOURCES[name](tmp_path)
    assert_refused(run("convert", made.checkpoint, tmp_path / "out", "--calibration", path))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--multiple-of", 7), "multiple of 7"),
        (("--multiple-of", 0), "multiple_of"),
        (("--multiple-of", -8), "multiple_of"),
        (("--max-skipped-layers", 99), "max_skipped_layers"),
        (("--max-skipped-layers", -1), "max_skipped_layers"),
    ],
)
def test_a_search_space_that_no_layer_can_have(
    run: Any, made: Places, options: tuple[object, ...], named: str, tmp_path: Path
) -> None:
    assert_refused(run("convert", made.checkpoint, tmp_path / "out", "--calibration", made.text, *options), named)
    assert not list(tmp_path.iterdir())


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda space: space["intermediate_sizes"].append(10_000),
        lambda space: space["num_groups"].append(100),
        lambda space: space.update(num_hidden_layers=space["num_hidden_layers"] + 1),
        lambda space: space["intermediate_sizes"].reverse(),
        lambda space: space.pop("num_groups"),
        lambda space: space.update(color=1),
    ],
)
def test_a_checkpoint_with_another_models_search_space(
    run: Any, elastic: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    change_json(elastic / "elastic.json", lambda data: change(data["search_space"]))
    for verb in ("info", "profile"):
        assert_refused(run(verb, elastic))


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.update(mlp_ms={"5": 0.1, "9": 0.2}),
        lambda table: table.update(attention_ms={"77": 0.1}),
        lambda table: table.pop("base_ms"),
        lambda table: table.update(mlp_ms=None),
        lambda table: table.update(base_ms="fast"),
    ],
)
def test_a_latency_table_of_another_model(
    run: Any, made: Places, elastic: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    (table,) = (elastic / "latency").iterdir()
    change_json(table, change)
    before = content(elastic)
    assert_refused(run("route", elastic, "--text", made.text), "latency table", "profile")
    assert content(elastic) == before


@pytest.mark.usefixtures("fast")
def test_figures_of_another_device_are_not_used(run: Any, elastic: Path) -> None:
    change_json(elastic / "frontier.json", lambda data: data.update(device="an-abacus"))
    assert_refused(run("generate", elastic, "Once", "--latency", 0.9), "an-abacus", "profile")


FULL = {
    "OSError": OSError(errno.ENOSPC, "No space left on device"),
    "SafetensorError": SafetensorError(
        'Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'
    ),
}


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("kind", sorted(FULL))
def test_a_full_disk_leaves_everything_as_it_was(
    run: Any, made: Places, elastic: Path, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def half(tensors: object, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half of a file")
        raise FULL[kind]

    before = content(elastic)
    monkeypatch.setattr(elastic_checkpoint, "save_file", half)
    assert_refused(run("route", elastic, "--text", made.text, "--num-tokens", 512), "no space is left", "again")
    after = content(elastic)
    assert after == before
    monkeypatch.setattr("flextron.checkpoints.weights.save_file", half)
    out = tmp_path / "out"
    assert_refused(run("convert", made.checkpoint, out, "--calibration", made.text), "no space is left")
    assert not out.exists()
    assert not [p for p in tmp_path.rglob(".*") if p.name.startswith(".out")]
