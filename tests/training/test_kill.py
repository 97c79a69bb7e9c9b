"""`kill -9` in the middle of training: the same command goes on and ends where an undisturbed run does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from transformers import AutoModelForCausalLM

import flextron
from flextron.workflows.elastify import elastify, read_recipe
from tests.tiny import make_tiny_llama
from tests.toy import Stages, assert_same_training, prose, weights_of

STEPS = 150


def start(recipe: Path, *launcher: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "flextron", "elastify", str(recipe), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def steps_saved(run_directory: Path) -> int:
    """Steps of the state on disk; 0 before there is one, or while it is being replaced."""
    try:
        return int(json.loads((run_directory / "state" / "run.json").read_text())["step"])
    except (FileNotFoundError, NotADirectoryError):
        return 0


def wait_for(run_directory: Path, steps: int, process: subprocess.Popen[str]) -> None:
    while steps_saved(run_directory) < steps:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def recipe_for(output: Path, sources: Path) -> Path:
    """A recipe that saves its state after every step."""
    text = str(sources / "text.txt")
    train = {
        "tokens": STEPS * 2 * 32,
        "context": 32,
        "batch_size": 2,
        "micro_batch_size": 2,
        "checkpoint_minutes": 1e-9,
        "lr": 1e-4,
    }
    data = {
        "source": str(sources / "tiny"),
        "output": str(output),
        "text": text,
        "convert": {"calibration": text, "ratios": [0.5, 1.0]},
        "train": train,
        "profile": {"text": text, "num_tokens": 256, "rounds": 1, "refinements": 0},
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.slow
def test_a_killed_training_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(prose())
    recipe = recipe_for(tmp_path / "killed", tmp_path)
    run_directory = tmp_path / "killed.run"
    process = start(recipe)
    wait_for(run_directory, 5, process)
    process.kill()
    process.communicate()
    assert process.returncode == -9
    first = steps_saved(run_directory)
    assert 5 <= first < STEPS - 20, "killed too late to show anything"
    before = flextron.load(tmp_path / "killed")
    assert not before.info.recipe

    process = start(recipe)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert all(0 < row["latency"] <= 1 + 1e-6 for row in json.loads(out))
    assert "converting" not in err
    assert not run_directory.exists()
    resumed = flextron.load(tmp_path / "killed")
    reference = elastify(read_recipe(recipe_for(tmp_path / "whole", tmp_path)), Stages())
    assert resumed.info.recipe["num_steps"] == reference.info.recipe["num_steps"] == STEPS
    assert_same_training(resumed.decoder, reference.decoder, weights_of(before.decoder))
    AutoModelForCausalLM.from_pretrained(tmp_path / "killed")


LAUNCHERS = {
    "torchrun": (
        *("-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
    ),
    "accelerate": ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"),
}


def workers_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The launcher's processes by rank."""
    found = [p for p in psutil.Process(launcher.pid).children(recursive=True) if "RANK" in p.environ()]
    return sorted((p for p in found if "elastify" in p.cmdline()), key=lambda p: int(p.environ()["RANK"]))


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_run_and_another_number_goes_on(lost: int, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(prose())
    recipe = recipe_for(tmp_path / "killed", tmp_path)
    run_directory = tmp_path / "killed.run"
    process = start(recipe, *LAUNCHERS["torchrun"])
    wait_for(run_directory, 5, process)
    workers_of(process)[lost].kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert out == ""
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(
        r"a process of the training was lost in step \d+ of 150; the state after step \d+ is saved", sentence
    )
    assert steps_saved(run_directory) >= 5
    before = flextron.load(tmp_path / "killed")
    assert not before.info.recipe

    resumed = elastify(read_recipe(recipe), Stages())
    assert not run_directory.exists()
    reference = elastify(read_recipe(recipe_for(tmp_path / "whole", tmp_path)), Stages())
    assert_same_training(resumed.decoder, reference.decoder, weights_of(before.decoder))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_need_no_other_change(launcher: str, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(prose())
    process = start(recipe_for(tmp_path / "together", tmp_path), *LAUNCHERS[launcher])
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert all(0 < row["latency"] <= 1 + 1e-6 for row in json.loads(out))  # once, by the first
    assert err.count("training: 150 of 150") == 1
    together = flextron.load(tmp_path / "together")
    reference = elastify(read_recipe(recipe_for(tmp_path / "whole", tmp_path)), Stages())
    assert together.info.recipe["num_steps"] == STEPS
    original = elastify(read_recipe(untrained_recipe(tmp_path)), Stages())
    assert_same_training(together.decoder, reference.decoder, weights_of(original.decoder))


def untrained_recipe(sources: Path) -> Path:
    """The same recipe without training."""
    path = recipe_for(sources / "untrained", sources)
    data = yaml.safe_load(path.read_text()) | {"train": None}
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.slow
def test_verbs_of_one_process_say_so(tmp_path: Path) -> None:
    command = [sys.executable, *LAUNCHERS["torchrun"], "-m", "flextron", "info", str(tmp_path)]
    found = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    (sentence,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert "2 processes, but info works in one" in sentence
