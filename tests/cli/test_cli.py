"""The command line: JSON alone on stdout, one sentence and exit code 2 for bad input, 130 for Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from flextron import api
from flextron.cli.main import VERBS, app, main
from flextron.routing import latency as latency_module
from tests.checkpoints.families_cases import CASES, GPT2, random_from, random_model
from tests.gguf.writing import fields_of, to_gguf, write_gguf
from tests.tiny import make_tiny_llama
from tests.toy import prose, synthetic_latencies

TRAIN = ("--tokens", "128", "--context", "32", "--batch-size", "2", "--micro-batch-size", "2")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Places:
    checkpoint: Path
    text: Path
    elastic: Path
    profiled: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A tiny checkpoint, a text, an elastic checkpoint and a profiled one; not to be changed."""
    root = tmp_path_factory.mktemp("cli")
    places = Places(root / "tiny", root / "text.txt", root / "elastic", root / "profiled")
    make_tiny_llama(places.checkpoint)
    places.text.write_text(prose())
    model = api.convert(places.checkpoint, calibration=str(places.text), num_calibration_tokens=512, context=64)
    model.save(places.elastic)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_module, "step_latencies_ms", synthetic_latencies)
        model.profile(str(places.text), num_tokens=256, context=32)
    model.save(places.profiled)
    return places


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process; an exception that escapes is a traceback to the user."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")

    def call(*args: object) -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["flextron", *map(str, args)])
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        return Outcome(int(code), *capfd.readouterr())

    return call


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """Exit code 2, nothing on stdout, and one line at the end of stderr that says what is wrong."""
    assert outcome.code == 2
    assert outcome.out == ""
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in last


def test_every_verb_prints_json_alone(run: Any, made: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flextron.routing.latency._MOST_ERROR", -1.0)  # as if something else had kept the machine busy
    elastic = tmp_path / "elastic"
    converted = run("convert", made.checkpoint, elastic, "--calibration", made.text, "--json")
    assert (converted.code, json.loads(converted.out)["family"]) == (0, "llama")
    assert "converting" in converted.err
    trained = run("train", elastic, "--data", made.text, *TRAIN, "--json")
    figures = json.loads(trained.out)
    assert (figures["steps"], figures["tokens"]) == (2, 128)
    assert figures["loss"] > 0
    assert "training" in trained.err
    assert not (tmp_path / "elastic.run").exists()
    profiled = run("profile", elastic, "--text", made.text, "--num-tokens", 512, "--rounds", 1, "--json")
    rows = json.loads(profiled.out)
    assert "warning: latencies" in profiled.err
    assert rows[0]["loss"] <= rows[-1]["loss"]
    facts = json.loads(run("info", elastic, "--json").out)
    assert facts["frontier"] == rows
    assert facts["recipe"]["num_tokens"] == 128
    assert facts["summary"]["trained_tokens"] == 128
    smallest = min(row["parameters"] for row in rows)
    limit = ("--params", smallest)
    generated = json.loads(run("generate", elastic, "Once upon", *limit, "--max-tokens", 4, "--json").out)
    model = api.load(elastic)
    assert generated["text"] == model.generate("Once upon", params=smallest, max_tokens=4)
    assert generated["subnet"] == model.select(params=smallest).to_dict()
    evaluated = json.loads(run("eval", elastic, "--text", made.text, "--num-tokens", 512, "--json").out)
    reference = model.evaluate({"full": model.space.full}, str(made.text), num_tokens=512)["full"]
    assert evaluated[0]["loss"] == pytest.approx(reference.loss)
    assert evaluated[0]["tokens"] == reference.num_tokens


def test_routes_are_trained_compared_drawn_and_used(
    run: Any, made: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_module, "step_latencies_ms", synthetic_latencies)
    elastic = tmp_path / "elastic"
    shutil.copytree(made.profiled, elastic)
    assert_refused(run("train", elastic, "--data", made.text, *TRAIN, "--with-router"), "flextron route")
    options = ("--text", made.text, "--num-tokens", 256, "--num-measured", 8, "--frontier", tmp_path / "picture")
    rows = json.loads(run("route", elastic, *options, "--json").out)
    assert rows[0]["latency"] == 0.9
    assert rows[0]["router"] > 0
    compared = json.loads((tmp_path / "picture" / "frontier.json").read_text())
    kinds = {p["kind"]: p["loss"] for p in compared["points"] if p["latency"] <= 0.9}
    assert {"router", "random"} <= set(kinds)
    assert (tmp_path / "picture" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "elastic.route").exists()
    assert api.load(elastic).router is not None
    trained = run("train", elastic, "--data", made.text, *TRAIN, "--with-router", "--json")
    assert json.loads(trained.out)["tokens"] == 128


def test_an_elastic_adapter_is_trained_goes_on_and_is_applied(run: Any, made: Places, tmp_path: Path) -> None:
    adapter, before = tmp_path / "adapter", load_file(made.elastic / "model.safetensors")
    rows = json.loads(
        run("train", made.elastic, "--data", made.text, *TRAIN, "--lora", 2, "--adapter", adapter, "--json").out
    )
    assert rows["tokens"] == 128
    after = load_file(made.elastic / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert_refused(run("train", made.elastic, *TRAIN, "--lora", 2, "--adapter", adapter), "exists already")
    assert_refused(run("train", made.elastic, *TRAIN, "--adapter", tmp_path / "other"), "--lora")
    assert_refused(run("train", adapter, "--data", made.text, *TRAIN, "--lora", 4), "rank 2")
    assert json.loads(run("train", adapter, "--data", made.text, *TRAIN, "--json").out)["tokens"] == 128
    assert api.load(adapter).info.recipe["num_tokens"] == 256
    assert run("apply", made.checkpoint, adapter, tmp_path / "applied").code == 0
    ours, right = api.load(tmp_path / "applied"), api.load(made.checkpoint, elastic=adapter)
    for mine, theirs in zip(ours.decoder.parameters(), right.decoder.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert_refused(run("apply", made.checkpoint, made.elastic, tmp_path / "none"), "no elastic adapter")
    assert_refused(run("profile", adapter), "flextron apply")


def test_people_get_tables_on_stdout(run: Any, made: Places) -> None:
    outcome = run("info", made.profiled)
    assert outcome.code == 0
    assert "llama" in outcome.out
    assert "latency" in outcome.out
    assert outcome.err == ""
    outcome = run("generate", made.profiled, "Once upon", "--max-tokens", 3)
    assert outcome.out.startswith("Once upon")


def test_a_frontier_is_a_table_or_a_file(run: Any, made: Places, tmp_path: Path) -> None:
    outcome = run("frontier", made.profiled, "--html", tmp_path / "frontier.html", "--json")
    assert json.loads(outcome.out) == json.loads(run("info", made.profiled, "--json").out)["frontier"]
    assert made.profiled.name in (tmp_path / "frontier.html").read_text("utf-8")
    assert_refused(run("frontier", made.elastic), "flextron profile")


def test_targets_reach_the_evaluation(run: Any, made: Places) -> None:
    outcome = run(
        "eval", made.profiled, "--text", made.text, "--num-tokens", 512, "--latency", 1, "--latency", 0.9, "--json"
    )
    rows = json.loads(outcome.out)
    assert [row["subnet"] for row in rows] == ["latency 1", "latency 0.9"]


def test_the_overview_says_what_the_verbs_say_and_imports_none() -> None:
    context = typer.Context(typer.main.get_command(app))
    group = context.command
    told = {name: group.get_command(context, name).help for name in group.list_commands(context)}  # type: ignore[attr-defined]
    assert {name: help_.split("\n\n")[0].replace("\n", " ") for name, help_ in told.items()} == VERBS
    look = "import sys; from flextron.cli.main import app; app(['--help'], standalone_mode=False); "
    subprocess.run([sys.executable, "-c", f"{look}sys.exit('torch' in sys.modules)"], check=True, capture_output=True)


def test_help_names_every_verb(run: Any) -> None:
    outcome = run("--help")
    assert outcome.code == 0
    for verb in ("demo", "convert", "train", "profile", "route", "elastify", "info", "frontier", "generate", "eval"):
        assert verb in outcome.out


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["info", "x", "--colour"], "--colour"),
        (["generate", "x"], "prompt"),
        (["retrain", "x"], "retrain"),
        (["train", "x", "--tokens", "many"], "--tokens"),
    ],
)
def test_wrong_usage_is_named(run: Any, args: list[str], named: str) -> None:
    outcome = run(*args)
    assert (outcome.code, outcome.out) == (2, "")
    assert named in outcome.err.lower()
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("verb", ["info", "train", "profile", "eval"])
def test_a_missing_directory(run: Any, verb: str, tmp_path: Path) -> None:
    assert_refused(run(verb, tmp_path / "nowhere"), "nowhere", "convert")


def test_a_missing_checkpoint(run: Any, tmp_path: Path) -> None:
    assert_refused(run("convert", tmp_path / "nowhere", tmp_path / "out"), "nowhere")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_kept_unless_told(run: Any, made: Places, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    args = ("convert", made.checkpoint, tmp_path / "mine", "--calibration", made.text)
    assert_refused(run(*args), "mine", "--overwrite")
    assert list((tmp_path / "mine").iterdir()) == []
    assert run(*args, "--overwrite").code == 0
    assert (tmp_path / "mine" / "elastic.json").exists()


def copy_of(checkpoint: Path, path: Path) -> Path:
    shutil.copytree(checkpoint, path)
    return path


def test_an_unsupported_architecture(run: Any, made: Places, tmp_path: Path) -> None:
    source = copy_of(made.checkpoint, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["OtterForCausalLM"], "model_type": "otter"}
    (source / "config.json").write_text(json.dumps(config))
    assert_refused(run("convert", source, tmp_path / "out", "--calibration", made.text), "OtterForCausalLM")


@pytest.mark.parametrize("keep", [4, 3000, 100_000])
def test_truncated_safetensors(run: Any, made: Places, keep: int, tmp_path: Path) -> None:
    source = copy_of(made.checkpoint, tmp_path / "source")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert_refused(run("convert", source, tmp_path / "out", "--calibration", made.text), "model.safetensors")


@pytest.mark.parametrize("keep", [3, 60, 2000, 9000])
def test_a_truncated_gguf(run: Any, made: Places, keep: int, tmp_path: Path) -> None:
    model = random_model("llama")
    whole = write_gguf(
        tmp_path / "m.gguf", "llama", fields_of(CASES["llama"]), to_gguf(model.state_dict(), CASES["llama"])
    )
    whole.write_bytes(whole.read_bytes()[:keep])
    assert_refused(run("convert", whole, tmp_path / "out", "--calibration", made.text), "m.gguf")


def test_weights_that_are_no_numbers(run: Any, made: Places, tmp_path: Path) -> None:
    source = copy_of(made.checkpoint, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(run("convert", source, tmp_path / "out", "--calibration", made.text), "model.norm.weight", "NaN")


def test_text_that_is_short_missing_or_unreadable(run: Any, made: Places, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert_refused(run("convert", made.checkpoint, tmp_path / "out", "--calibration", short), "less than one context")
    assert_refused(run("eval", made.elastic, "--text", short), "less than one context")
    assert_refused(run("eval", made.elastic, "--text", tmp_path / "nothing.txt"), "nothing.txt")
    short.write_bytes(b"\xff\xfe\x00 no utf-8")
    assert_refused(run("eval", made.elastic, "--text", short), "short.txt", "UTF-8")


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (["--latency", "0.01"], "no sub-network reaches latency=0.01"),
        (["--latency", "1.5"], "latency"),
        (["--params", "5"], "params=5"),
        (["--latency-ms", "-1"], "latency_ms"),
        (["--latency", "0.9", "--params", "10000"], "exactly one"),
        (["--memory-gb", "1e-9"], "no sub-network reaches memory_gb=1e-09"),
        (["--memory-gb", "1", "--context", "0"], "context"),
        (["--latency", "0.9", "--router", "token"], "no token router yet"),
        (["--latency", "0.9", "--router", "magic"], "no router 'magic'"),
    ],
)
def test_impossible_targets(run: Any, made: Places, target: list[str], named: str) -> None:
    assert_refused(run("generate", made.profiled, "Once", *target), named)


def test_a_target_before_profiling(run: Any, made: Places) -> None:
    assert_refused(run("generate", made.elastic, "Once", "--latency", 0.5), "flextron profile")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--precision", "fp8"], "precision"),
        (["--lr", "0"], "lr"),
        (["--tokens", "0"], "tokens"),
        (["--batch-size", "3", "--micro-batch-size", "2"], "batch_size 3"),
        (["--seed", "-1"], "seed"),
        (["--teacher", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_training_settings_that_do_not_fit(run: Any, made: Places, args: list[str], named: str, tmp_path: Path) -> None:
    elastic = copy_of(made.elastic, tmp_path / "elastic")
    assert_refused(run("train", elastic, "--data", made.text, *TRAIN, *args), named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"trian": {}}, "trian"),
        ({"train": {"learning_rate": 1}}, "train.learning_rate"),
        ({"profile": {"rounds": "some"}}, "profile.rounds"),
        ({"source": None}, "source"),
    ],
)
def test_bad_recipe_keys_are_named(run: Any, change: dict[str, Any], named: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"source": "x", "output": str(tmp_path / "out")} | change))
    assert_refused(run("elastify", recipe), "recipe.yaml", named)


@pytest.mark.parametrize("content", ["[1, 2]", "", "a: [", "source: x: y"])
def test_recipes_that_are_none(run: Any, content: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    assert_refused(run("elastify", tmp_path / "recipe.yaml"), "recipe.yaml")
    assert_refused(run("elastify", tmp_path / "missing.yaml"), "missing.yaml", "does not exist")


def test_an_error_that_is_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch, run: Any, made: Places) -> None:
    def broken(path: Path) -> None:
        raise RuntimeError("something is wrong inside")

    monkeypatch.setattr(api, "load", broken)
    with pytest.raises(RuntimeError, match="inside"):
        run("info", made.elastic)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_has_a_remedy(
    error: Exception, monkeypatch: pytest.MonkeyPatch, run: Any, made: Places
) -> None:
    def starved(path: Path) -> None:
        raise error

    monkeypatch.setattr(api, "load", starved)
    assert_refused(run("info", made.elastic), "out of memory", "smaller")


@pytest.mark.parametrize("verb", ["train", "eval", "profile"])
def test_a_context_beyond_the_models_positions(run: Any, made: Places, verb: str, tmp_path: Path) -> None:
    source = copy_of(made.checkpoint, tmp_path / "source")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (source / name).unlink()
    random_from(GPT2Config(**GPT2 | {"vocab_size": 300}, n_layer=3, n_inner=40)).save_pretrained(source)
    assert run("convert", source, tmp_path / "gpt2", "--calibration", made.text).code == 0
    options = {
        "train": ["--data", made.text, *TRAIN, "--context", 65],
        "eval": ["--text", made.text, "--context", 65],
        "profile": ["--text", made.text, "--decode-context", 64],
    }
    assert_refused(run(verb, tmp_path / "gpt2", *options[verb]), "64")


def start(*args: object) -> subprocess.Popen[str]:
    """The command line as a process, in which Ctrl-C means what it does in a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "flextron", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_as_a_process_results_and_errors_keep_apart(made: Places) -> None:
    good = start("info", made.profiled, "--json")
    out, _ = good.communicate(timeout=120)
    assert good.returncode == 0
    assert json.loads(out)["summary"]["family"] == "llama"


def test_ctrl_c_in_training_ends_without_a_traceback(made: Places, tmp_path: Path) -> None:
    elastic = copy_of(made.elastic, tmp_path / "elastic")
    process = start("train", elastic, "--data", made.text, "--tokens", 10_000_000, "--context", 64)
    assert process.stderr is not None
    seen: list[str] = []
    while "training" not in (line := process.stderr.readline()):
        assert line, "".join(seen)
        seen.append(line)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert "interrupted" in err.strip().splitlines()[-1]
    api.load(elastic)
