"""From a recipe file to a profiled model, stage by stage, each of them once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import flextron
from flextron.errors import FlextronError
from flextron.routing import latency as latency_module
from flextron.workflows import elastify as module
from flextron.workflows.elastify import elastify, read_recipe
from tests.tiny import make_tiny_llama
from tests.toy import Stages, prose, same_weights, synthetic_latencies, weights_of


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny checkpoint and two texts."""
    root = tmp_path_factory.mktemp("elastify")
    make_tiny_llama(root / "tiny")
    (root / "text.txt").write_text(prose(seed=0))
    (root / "other.txt").write_text(prose(seed=1))
    return root


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module, "step_latencies_ms", synthetic_latencies)


def recipe_data(sources: Path, output: Path, **changes: Any) -> dict[str, Any]:
    text = str(sources / "text.txt")
    data = {
        "source": str(sources / "tiny"),
        "output": str(output),
        "text": text,
        "convert": {"calibration": text, "ratios": [0.25, 0.5, 1.0]},
        "train": {"tokens": 256, "context": 32, "batch_size": 2, "micro_batch_size": 2},
        "profile": {"text": text, "num_tokens": 256, "rounds": 1, "refinements": 0},
    }
    return data | changes


def written(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_recipe_is_done_once(sources: Path, tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path / "recipe.yaml", recipe_data(sources, tmp_path / "out")))
    stages = Stages()
    model = elastify(recipe, stages)
    assert stages.opened[0] == "converting"
    assert {"training", "measuring latencies"} <= set(stages.opened)
    assert recipe.train is not None
    assert model.info.recipe["train"] == recipe.train.model_dump(mode="json")
    assert model.space.intermediate_sizes == (64, 128, 256)
    assert model.frontier is not None
    assert not (tmp_path / "out.run").exists()
    again = Stages()
    back = elastify(recipe, again)
    assert again.opened == []
    assert back.frontier == model.frontier
    assert same_weights(weights_of(back.decoder), weights_of(model.decoder))


def test_an_interruption_anywhere_is_made_up_for(sources: Path, tmp_path: Path) -> None:
    reference = elastify(read_recipe(written(tmp_path / "a.yaml", recipe_data(sources, tmp_path / "a"))), Stages())
    recipe = read_recipe(written(tmp_path / "b.yaml", recipe_data(sources, tmp_path / "b")))
    opened: list[str] = []
    for stop in range(20):
        # each attempt gets one stage further than the last, of those that it finds undone
        stages = Stages(stop=stop)
        try:
            model = elastify(recipe, stages)
        except KeyboardInterrupt:
            opened += stages.opened
        else:
            break
    assert opened.count("converting") == 1
    assert same_weights(weights_of(model.decoder), weights_of(reference.decoder))
    assert model.frontier is not None
    assert reference.frontier is not None
    assert model.frontier.full.loss == pytest.approx(reference.frontier.full.loss, rel=1e-4)


def test_training_can_be_left_out(sources: Path, tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path / "r.yaml", recipe_data(sources, tmp_path / "out", train=None)))
    stages = Stages()
    model = elastify(recipe, stages)
    assert "training" not in stages.opened
    assert model.info.recipe == {}
    assert model.frontier is not None


@pytest.fixture(scope="module")
def finished(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of `recipe_data`; not to be changed."""
    output = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_module, "step_latencies_ms", synthetic_latencies)
        elastify(read_recipe(written(output.with_name("r.yaml"), recipe_data(sources, output))), Stages())
    return output


def other_recipe(sources: Path, output: Path, change: str) -> dict[str, Any]:
    """The recipe of `finished` with one thing changed."""
    data = recipe_data(sources, output)
    other = str(sources / "other.txt")
    changes: dict[str, dict[str, Any]] = {
        "train": {"train": data["train"] | {"tokens": 512}},
        "no training": {"train": None},
        "source": {"source": str(sources / "another")},
        "text": {"text": other},
        "convert": {"convert": data["convert"] | {"ratios": [0.5, 1.0]}},
        "profile": {"profile": data["profile"] | {"text": other}},
    }
    return data | changes[change]


@pytest.mark.parametrize("change", ["train", "no training", "source", "text", "convert", "profile"])
def test_another_recipe_on_the_same_output_is_refused(
    change: str, sources: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    recipe = read_recipe(written(tmp_path / "r.yaml", other_recipe(sources, output, change)))
    for stage in ("convert", "train_in_place", "run_profile"):
        monkeypatch.delattr(module, stage)
    with pytest.raises(FlextronError, match="another recipe"):
        elastify(recipe, Stages())
    flextron.load(output)


def test_a_directory_that_is_something_else_is_kept(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    recipe = read_recipe(written(tmp_path / "r.yaml", recipe_data(sources, tmp_path / "out")))
    with pytest.raises(FlextronError, match="not an elastic checkpoint"):
        elastify(recipe, Stages())
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: &a [x]\nb: [*a, *a]\n", r"it uses aliases \(\*name\)"),
        ("a: &a [*a]\n", "aliases"),
        ("[" * 10_000, "cannot be read"),
        ("source: " + "9" * 5000, "cannot be read"),
        ("source: 2020-99-99", "cannot be read"),
        ("x" * 100_000, "100000 bytes, more than"),
        ("- 1", "the recipe"),
        ("", "the recipe"),
    ],
)
def test_recipes_that_would_take_for_ever_are_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(FlextronError, match=said):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(FlextronError, match="is not a regular file"):
        read_recipe(tmp_path / "recipe.yaml")
