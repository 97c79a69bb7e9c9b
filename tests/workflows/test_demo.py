"""The demo at toy size: everything it promises is there, a second run repeats nothing, an interrupted one goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import flextron
from flextron.errors import FlextronError
from flextron.routing import latency as latency_module
from flextron.training.recipe import TrainRecipe
from flextron.workflows import demo as module
from flextron.workflows.demo import DemoSettings, run_demo
from flextron.workflows.elastify import ProfileStage
from tests.tiny import make_tiny_llama
from tests.toy import Stages, prose, synthetic_latencies, synthetic_ms

TARGETS = (1.0, 0.8, 0.6)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny checkpoint and a text."""
    root = tmp_path_factory.mktemp("demo")
    make_tiny_llama(root / "tiny")
    (root / "text.txt").write_text(prose(20_000))
    return root


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings that do not depend on the machine, on which a tiny model's widths would drown."""
    monkeypatch.setattr(latency_module, "step_latencies_ms", synthetic_latencies)
    monkeypatch.setattr(module, "step_latencies_ms", synthetic_latencies)


def settings(sources: Path, output: Path, **changes: Any) -> DemoSettings:
    values: dict[str, Any] = {
        "model": str(sources / "tiny"),
        "data": str(sources / "text.txt"),
        "output": output,
        "targets": TARGETS,
        "minutes": 1e-6,
        "train": TrainRecipe(context=32, batch_size=2, micro_batch_size=2),
        "eval_tokens": 512,
        "profile": ProfileStage(num_tokens=256, rounds=1, refinements=0),
    }
    return DemoSettings(**values | changes)


def test_the_demo_leaves_what_it_promises_and_is_done_once(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(sources, tmp_path / "out")
    facts = run_demo(asked, Stages())
    assert [row["target"] for row in facts["rows"]] == list(TARGETS)
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert Path(facts["picture"]) == tmp_path / "out" / "frontier.png"
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == facts
    model = flextron.load(tmp_path / "out" / "elastic")
    assert model.info.recipe["num_tokens"] == facts["trained_tokens"] > 0
    assert model.frontier is not None
    full = model.num_parameters()
    for row in facts["rows"]:
        # 1.0 is the full network itself, whatever else loses as little
        spec = model.space.full if row["target"] == 1 else model.select(latency=row["target"])
        assert row["parameters"] == model.num_parameters(spec) <= full
        assert row["mem_mb"] == pytest.approx(4e-6 * row["parameters"])
        assert row["latency_ms"] == pytest.approx(synthetic_ms(spec))
        assert row["latency_ms"] <= row["target"] * synthetic_ms(model.space.full) * (1 + 1e-6)
        assert row["speed_up"] == pytest.approx(facts["rows"][0]["latency_ms"] / row["latency_ms"])
        assert row["text"] == model.generate(facts["prompt"], spec=spec, max_tokens=24)
        for stage in ("before", "after"):
            loss = facts[stage]["targets"][str(row["target"])]["test_loss"]
            assert row[f"perplexity_{stage}"] == pytest.approx(math.exp(loss))
    names = ("before", "after")
    original = facts["before"]["targets"]["1.0"]["test_loss"]
    before, after = (facts[n]["targets"]["0.6"]["test_loss"] - original for n in names)
    # of a random model, less may lose less
    assert facts["rows"][2]["gap_remaining"] == pytest.approx(after / before if before > 1e-9 else 0.0)

    for stage in ("convert", "load", "train_in_place", "evaluation_text"):
        monkeypatch.delattr(module, stage)
    again = Stages()
    assert run_demo(asked, again) == facts
    assert again.opened == []


def test_the_test_text_is_neither_trained_nor_searched_on(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topics = [prose(3000, seed=s) for s in range(10, 18)]
    # one topic that is trained on by default quotes one that is not
    topics[2] += "\n\n" + topics[1]
    monkeypatch.setattr(module, "evaluation_text", lambda: topics)
    monkeypatch.setattr(module, "training_text", lambda: [prose(2000, seed=99)])
    leaky = sources / "leaky.txt"
    leaky.write_text((sources / "text.txt").read_text() + "\n\n" + topics[1])
    passage = " ".join(topics[1].split()[100:130])
    assert passage in leaky.read_text()
    for data in (str(leaky), None):
        demo = module._Demo(settings(sources, tmp_path, data=data), Stages(), {})
        training, search, test = demo.texts()
        assert {*search, *test} == {topics[i] for i in (1, 3, 5, 7)}
        assert not set(search) & set(test)
        assert len(training) > 0
        assert all(passage not in document for document in training)


def test_an_interruption_anywhere_is_made_up_for(sources: Path, tmp_path: Path) -> None:
    asked = settings(sources, tmp_path / "out")
    whole = run_demo(settings(sources, tmp_path / "whole"), Stages())
    done: list[str] = []
    stop = 0
    while True:
        stages = Stages(stop=stop)
        try:
            facts = run_demo(asked, stages)
            done += stages.opened
            break
        except KeyboardInterrupt:
            done += stages.opened
            stop += 1
        assert stop < 20
    assert done.count("converting tiny") == 1
    assert facts["trained_tokens"] == whole["trained_tokens"]
    for ours, theirs in zip(facts["rows"], whole["rows"], strict=True):
        assert ours["perplexity_before"] == pytest.approx(theirs["perplexity_before"], rel=1e-4)
        assert ours["perplexity_after"] == pytest.approx(theirs["perplexity_after"], rel=1e-3)


def test_another_demo_in_the_same_place_is_refused(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_demo(settings(sources, tmp_path), Stages(stop=0))
    for change in ({"minutes": 2.0}, {"targets": (1.0,)}, {"data": None}, {"model": "another"}):
        with pytest.raises(FlextronError, match="another demo"):
            run_demo(settings(sources, tmp_path, **change), Stages(stop=0))


def test_a_missing_model_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(FlextronError, match=r"pip install .*--model"):
        module.default_model()
