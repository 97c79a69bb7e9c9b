"""`flextron.finetune`: an adapter from a file of examples, the same one whether or not it was killed in between."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import flextron
from flextron import ElasticModel, FlextronError
from flextron.checkpoints.peft.reading import read_adapter
from flextron.finetuning.dataset import read_dataset
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.lora import LoraTrainer
from flextron.finetuning.trainer import StepMetrics
from flextron.workflows.tiny import tiny_model
from tests.jobs.making import jsonl
from tests.jobs.scoring import score
from tests.trained import trained_model

PAIRS = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Austria", "Vienna"), ("Norway", "Oslo")]
RECORDS = [{"prompt": f"The capital of {a} is", "completion": f" {b}"} for a, b in PAIRS]
CHOSEN: Any = {"n_epochs": 3, "batch_size": 2, "rank": 4, "learning_rate": 1e-2}
"""Nine steps."""


@pytest.fixture(scope="module")
def model() -> ElasticModel:
    return flextron.load(tiny_model())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(jsonl(RECORDS))
    return path


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


class KilledError(Exception):
    """In the middle of a step."""


def killed_after(number: int) -> Any:
    def on_step(done: int, total: int, figures: dict[str, float]) -> None:
        if done == number:
            raise KilledError

    return on_step


def test_from_examples_to_an_adapter(model: ElasticModel, data: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    out = tmp_path / "new" / "adapter"
    result = flextron.finetune(
        model, data, out, seed=1, on_step=lambda done, total, figures: told.append((done, total)), **CHOSEN
    )
    assert told == [(n, 9) for n in range(1, 10)]
    assert (result.adapter, result.num_examples, result.num_truncated, result.num_steps) == (out, 5, 0, 9)
    assert len(result.losses) == 9
    assert result.losses[-1] < result.losses[0]
    assert result.num_tokens % 3 == 0
    assert sorted(p.name for p in out.parent.iterdir()) == ["adapter"]
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "finetuning.json",
    ]
    figures = json.loads((out / "finetuning.json").read_text())
    assert figures["losses"] == list(result.losses)
    assert figures["run"]["seed"] == 1
    adapter = read_adapter(out, model.decoder)
    assert adapter.has_mlp
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


def test_validation(model: ElasticModel, data: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "valid.jsonl"
    held_out.write_bytes(jsonl([{"prompt": "The capital of France is", "completion": " Rome"}]))
    told: list[float | None] = []
    result = flextron.finetune(
        model,
        data,
        tmp_path / "out",
        validation=held_out,
        on_step=lambda done, total, figures: told.append(figures.get("validation loss")),
        **CHOSEN,
    )
    assert [step for step, _, _ in result.validations] == [3, 6, 9]
    assert [loss for loss in told if loss is not None] == [loss for _, loss, _ in result.validations]
    assert model.tokenizer is not None
    examples = read_dataset(held_out, model.tokenizer, Hyperparameters(), 128).examples
    loss, accuracy = score(model.decoder, read_adapter(result.adapter, model.decoder), examples)
    assert result.validations[-1] == (9, pytest.approx(loss, abs=1e-4), pytest.approx(accuracy))
    figures = json.loads((result.adapter / "finetuning.json").read_text())
    assert figures["validations"] == [list(v) for v in result.validations]
    without = flextron.finetune(model, data, tmp_path / "without", **CHOSEN)
    assert (without.losses, without.validations) == (result.losses, ())
    with pytest.raises(FlextronError, match="nowhere is not a file"):
        flextron.finetune(model, data, tmp_path / "none", validation=tmp_path / "nowhere", **CHOSEN)
    held_out.write_bytes(jsonl([{"prompt": "a"}]))
    with pytest.raises(FlextronError, match=r"valid\.jsonl: line 1 must have"):
        flextron.finetune(model, data, tmp_path / "none", validation=held_out, **CHOSEN)


@pytest.mark.parametrize("is_validated", [False, True])
def test_a_killed_run_goes_on(model: ElasticModel, data: Path, tmp_path: Path, is_validated: bool) -> None:
    options = CHOSEN | ({"validation": data} if is_validated else {})
    whole = flextron.finetune(model, data, tmp_path / "whole", **options)
    out = tmp_path / "broken"
    for number in (1, 4, 5):
        with pytest.raises(KilledError):
            flextron.finetune(model, data, out, save_seconds=0, on_step=killed_after(number), **options)
        assert not out.exists()
    told: list[int] = []
    result = flextron.finetune(
        model, data, out, save_seconds=0, on_step=lambda done, total, figures: told.append(done), **options
    )
    assert told[0] > 1
    assert (result.losses, result.num_tokens) == (whole.losses, whole.num_tokens)
    assert (result.validations, len(result.validations)) == (whole.validations, 3 * is_validated)
    assert all(torch.equal(a, b) for a, b in zip(weights(out).values(), weights(whole.adapter).values(), strict=True))
    assert not (tmp_path / "broken.run").exists()


def test_another_run_is_not_gone_on_with(model: ElasticModel, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KilledError):
        flextron.finetune(model, data, out, save_seconds=0, on_step=killed_after(3), **CHOSEN)
    with pytest.raises(FlextronError, match=r"differs in seed, hyperparameters; .*--restart"):
        flextron.finetune(model, data, out, seed=2, **(CHOSEN | {"rank": 2}))
    data.write_bytes(jsonl(RECORDS[:4]))
    with pytest.raises(FlextronError, match="differs in data"):
        flextron.finetune(model, data, out, **CHOSEN)
    told: list[int] = []
    flextron.finetune(
        model, data, out, seed=2, restart=True, on_step=lambda done, total, figures: told.append(done), **CHOSEN
    )
    assert told == [1, 2, 3, 4, 5, 6]
    before = weights(out)
    with pytest.raises(FlextronError, match="exists already"):
        flextron.finetune(model, data, out, **CHOSEN)
    flextron.finetune(model, data, out, seed=3, restart=True, **CHOSEN)
    assert any(not torch.equal(a, b) for a, b in zip(weights(out).values(), before.values(), strict=True))


def test_two_at_once_are_refused(model: ElasticModel, data: Path, tmp_path: Path) -> None:
    def again(done: int, total: int, figures: dict[str, float]) -> None:
        with pytest.raises(FlextronError, match="in use by another process"):
            flextron.finetune(model, data, tmp_path / "out", **CHOSEN)

    flextron.finetune(model, data, tmp_path / "out", on_step=again, **(CHOSEN | {"n_epochs": 1}))


def _train(data: Path, out: Path, at: int) -> None:
    def on_step(done: int, total: int, figures: dict[str, float]) -> None:
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)

    flextron.finetune(tiny_model(), data, out, save_seconds=0, on_step=on_step, **CHOSEN)


@pytest.mark.slow
def test_kill_9(model: ElasticModel, data: Path, tmp_path: Path) -> None:
    whole = flextron.finetune(tiny_model(), data, tmp_path / "whole", **CHOSEN)
    for at in (3, 6, 100):
        child = multiprocessing.get_context("spawn").Process(target=_train, args=(data, tmp_path / "out", at))
        child.start()
        child.join()
        assert (child.exitcode == 0) == (at == 100)
    found = weights(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(found.values(), weights(whole.adapter).values(), strict=True))


def test_in_a_sub_network(data: Path, tmp_path: Path) -> None:
    model = trained_model()
    whole = flextron.finetune(model, data, tmp_path / "whole", **CHOSEN)
    narrow = flextron.finetune(model, data, tmp_path / "narrow", target=flextron.Target(latency=0.6), **CHOSEN)
    assert narrow.spec == model.select(latency=0.6) != whole.spec
    assert narrow.losses[0] != whole.losses[0]
    assert narrow.losses[-1] < narrow.losses[0]
    read_adapter(narrow.adapter, model.decoder)
    with pytest.raises(FlextronError, match="latency"):
        flextron.finetune(model, data, tmp_path / "none", target=flextron.Target(latency=0.01), **CHOSEN)


@pytest.mark.parametrize(
    ("content", "chosen", "said"),
    [
        (None, {}, "is not a file"),
        (b"", {}, "has no example"),
        (b"{", {}, "train.jsonl: line 1 is not valid JSON"),
        (jsonl(RECORDS), {"rank": 0}, "rank must be"),
        (jsonl(RECORDS), {"color": 1}, "no hyperparameter 'color'"),
        (jsonl(RECORDS), {"target_modules": ["lm_head"]}, "target_modules must be some of"),
        (jsonl(RECORDS), {"max_tokens": 3, "over_long": "refuse"}, "line 1 has"),
    ],
)
def test_bad_input_leaves_nothing(
    model: ElasticModel, tmp_path: Path, content: bytes | None, chosen: Any, said: str
) -> None:
    data = tmp_path / "train.jsonl"
    if content is not None:
        data.write_bytes(content)
    with pytest.raises(FlextronError, match=said):
        flextron.finetune(model, data, tmp_path / "out", **chosen)
    assert [p.name for p in tmp_path.iterdir()] == ([] if content is None else ["train.jsonl"])


def test_a_loss_that_is_no_number(
    model: ElasticModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraTrainer, "step", lambda self: StepMetrics(loss=math.nan, num_tokens=1))
    with pytest.raises(FlextronError, match=r"loss became nan .*learning_rate"):
        flextron.finetune(model, data, tmp_path / "out", **CHOSEN)
    assert not (tmp_path / "out").exists()
