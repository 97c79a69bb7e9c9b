"""`ElasticModel.export` and its verb: targets, formats by name and suffix, and what they choose."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import flextron
from flextron.cli.main import app
from flextron.export import FORMATS, Source, export, holds
from flextron.spec import SubnetSpec
from tests.export.sources import measured

UNIFORM = SubnetSpec.uniform(num_hidden_layers=4, intermediate_size=128, num_groups=2)
MIXED = SubnetSpec.of([256, 192, 0, 256], [4, 2, 0, 2])


@pytest.fixture
def model() -> flextron.ElasticModel:
    """The packaged model with made-up measurements of another device: only sizes can be asked for."""
    found = flextron.load("tiny")
    found.frontier = measured(found, UNIFORM, MIXED)  # type: ignore[arg-type]
    return found


def run(*args: str) -> Any:
    """What the verb prints with `--json`."""
    done = CliRunner().invoke(app, ["export", *args, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_target_chooses_the_best_that_the_format_holds(model: flextron.ElasticModel, tmp_path: Path) -> None:
    assert model.num_parameters(UNIFORM) < model.num_parameters(MIXED)
    limit = model.num_parameters(MIXED)
    assert model.export(tmp_path / "small.gguf", params=limit).spec == MIXED
    made = model.export(tmp_path / "small", params=limit)
    assert (made.format, made.spec, made.widths) == ("hf", UNIFORM, UNIFORM)
    padded = model.export(tmp_path / "padded", params=limit, pad=True)
    assert padded.spec == MIXED
    assert padded.widths.is_uniform
    text = "The city was"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "padded")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    answer = stock.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert model.generate(text, spec=MIXED, max_tokens=8) == tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"spec": UNIFORM, "latency": 0.5}, "not both: spec and latency"),
        ({"format": "onnx"}, "no export format 'onnx'; choose one of hf, gguf, nemotron-nas"),
        ({"latency": 0.5}, "latencies were measured on a-cpu"),
        ({"params": 10}, "no sub-network reaches params=10"),
        ({"spec": SubnetSpec.of([0] * 4, [0] * 4)}, "without layers cannot be exported"),
        ({"spec": SubnetSpec.of([512] * 4, [4] * 4)}, "not nested in the model"),
        ({"precision": "q4_0"}, "hf files do not store q4_0"),
    ],
)
def test_what_cannot_be_done_is_refused(
    model: flextron.ElasticModel, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(flextron.FlextronError, match=reason):
        model.export(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_every_format_holds_what_it_says(model: flextron.ElasticModel, tmp_path: Path) -> None:
    source: Source = model
    for format in FORMATS.values():
        for i, spec in enumerate((UNIFORM, MIXED)):
            path = tmp_path / f"{format.name}-{i}{format.suffix}"
            if holds(format, model.decoder.config, spec):
                assert export(source, path, spec, format=format).path.exists()
            else:
                with pytest.raises(flextron.FlextronError):
                    export(source, path, spec, format=format)
                assert not path.exists()


def test_the_verb_writes_files_and_tables(model: flextron.ElasticModel, tmp_path: Path) -> None:
    directory = tmp_path / "elastic"
    model.save(directory)
    limit = str(model.num_parameters(MIXED))
    found = run(str(directory), str(tmp_path / "small.gguf"), "--params", limit, "--precision", "q8_0")
    assert (found["format"], found["architecture"], found["precision"]) == ("gguf", "deci", "q8_0")
    assert SubnetSpec.from_dict(found["spec"]) == MIXED
    assert found["mb"] == (tmp_path / "small.gguf").stat().st_size / 1e6
    found = run(str(directory), str(tmp_path / "small"), "--params", limit)
    assert (found["format"], found["architecture"]) == ("hf", "LlamaForCausalLM")
    found = run(str(directory), str(tmp_path / "slices.csv"))
    with (tmp_path / "slices.csv").open(newline="") as stream:
        assert found["slices"] == len(list(csv.DictReader(stream))) == 1
    done = CliRunner().invoke(app, ["export", str(directory), str(tmp_path / "slices.csv"), "--pad"])
    assert done.exit_code == 2
    assert "all measured ones" in " ".join(done.output.split())


def test_an_adapter_has_a_card_of_the_hub(tmp_path: Path) -> None:
    tiny = flextron.load("tiny")
    tiny.extract(tiny.space.full).save_pretrained(tmp_path / "base")
    model = flextron.convert(tmp_path / "base", calibration=["The river ran past the mill. " * 50] * 20)
    model.train(
        ["The river ran past the mill. " * 200],
        flextron.TrainRecipe(tokens=128, context=32, batch_size=2, micro_batch_size=2, lora_rank=2),
    )
    model.frontier = measured(model, UNIFORM)  # type: ignore[arg-type]
    model.save_adapter(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.library_name == "flextron"
    assert "adapter" in card.data.tags
    assert card.data.base_model is None
    assert str(tmp_path) not in card.text
    assert "rank 2" in card.text
    assert f"{model.num_parameters(UNIFORM):,}" in card.text
    assert flextron.load(tmp_path / "base", elastic=tmp_path / "adapter").adapter is not None
