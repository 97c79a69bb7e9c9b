"""The reproduction keeps its promises: budgets, held-out text, equal comparisons, runs that are never repeated."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import flextron
from experiments.reproduction import methods, plan
from experiments.reproduction.__main__ import main, reproduce, settings
from experiments.reproduction.asset import write_asset
from experiments.reproduction.choosing import choose
from experiments.reproduction.command import command_options, command_parser, scale_of
from experiments.reproduction.data import prepare, split_of
from experiments.reproduction.models import Shape, fresh_decoder, hf_config
from experiments.reproduction.report import claims
from experiments.reproduction.scales import SCALES, Scale, uniform_widths
from experiments.reproduction.setting import Setting
from flextron.errors import FlextronError
from flextron.families.config import config_from_hf
from flextron.model.batch import Batch
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import SearchSpace, SubnetSpec
from tests.toy import prose

TINY: Scale = dataclasses.replace(
    SCALES["smoke"],
    tokens=30_000,
    sizes=(0.7, 0.6),
    ablation_size=0.6,
    shapes={
        "llama": Shape(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
        )
    },
    seeds={"llama": 1},
)


def corpus(path: Path, num_documents: int = 400) -> Path:
    """Documents that differ, as a file."""
    rng = random.Random(0)
    texts = [f"{rng.randrange(10**9)} {prose(120, seed=i)}" for i in range(num_documents)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def tiny_setting(directory: Path, scale: Scale = TINY) -> Setting:
    data = prepare(
        directory / "data",
        str(corpus(directory / "text.jsonl")),
        vocab_size=scale.vocab_size,
        num_train_tokens=scale.tokens,
        num_search_tokens=scale.num_search_tokens,
        num_validation_tokens=scale.num_validation_tokens,
        context=scale.context,
    )
    (setting,) = settings(scale, data, directory)
    return setting


@pytest.mark.parametrize("name", sorted(SCALES))
def test_post_training_takes_7_63_percent_of_the_tokens_and_no_more(name: str) -> None:
    scale = SCALES[name]
    per_step = scale.elastic_batch_size * scale.context
    taken = scale.elastic_steps * per_step
    assert taken <= 0.0763 * scale.tokens < taken + per_step
    assert 0 < scale.joint_steps < scale.elastic_steps


@pytest.mark.parametrize("name", ["cpu", "gpu"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_variants_have_the_sizes_that_they_are_named_for(name: str, family: Any) -> None:
    scale = SCALES[name]
    raw = hf_config(family, scale.shapes[family], vocab_size=64, context=scale.context, eos_token_id=0)
    full = sum(p.numel() for n, p in fresh_decoder(raw, 0).named_parameters() if n.startswith("layers."))
    for size in scale.sizes:
        widths = uniform_widths(config_from_hf(raw), size, scale.width_step)
        small = fresh_decoder(raw, 0, widths)
        count = sum(p.numel() for n, p in small.named_parameters() if n.startswith("layers."))
        assert count / full == pytest.approx(size, abs=0.03)


def test_no_held_out_text_is_trained_on(tmp_path: Path) -> None:
    data = tiny_setting(tmp_path).data
    documents = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    numbers = {split: {d.split()[0] for d in documents if split_of(d) == split} for split in ("train", "validation")}
    assert len(numbers["validation"]) > 2
    train = data.tokenizer.decode(data.train.tokens.flatten())
    validation = data.tokenizer.decode(data.validation_BT.flatten())
    search = data.tokenizer.decode(data.search_BT.flatten())
    assert sum(n in train for n in numbers["train"]) > 50
    assert sum(n in validation for n in numbers["validation"]) > 1
    for number in numbers["validation"]:
        assert number not in train
        assert number not in search
    assert not any(number in validation for number in numbers["train"])


def test_other_text_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    tiny_setting(tmp_path)
    with pytest.raises(FlextronError, match="another text"):
        tiny_setting(tmp_path, dataclasses.replace(TINY, tokens=20_000))


def test_text_without_held_out_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(prose())
    assert main(["--data", str(tmp_path / "one.txt"), "--output", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fresh_models_start_at_the_loss_of_a_uniform_guess(family: Any) -> None:
    shape = Shape(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2
    )
    raw = hf_config(family, shape, vocab_size=500, context=32, eos_token_id=0)
    tokens = torch.randint(0, 500, (8, 32), generator=torch.Generator().manual_seed(0))
    decoder = fresh_decoder(raw, 0)
    hidden = decoder(Batch.padded(tokens, decoder.widths))
    loss = F.cross_entropy(
        decoder.logits(hidden.detach()).view(8, 32, -1)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert loss.item() == pytest.approx(np.log(500), abs=0.1)
    # seeds differ, and a seed is always the same
    assert torch.equal(fresh_decoder(raw, 0).embedding.weight, decoder.embedding.weight)
    assert not torch.equal(fresh_decoder(raw, 1).embedding.weight, decoder.embedding.weight)
    narrow = SubnetSpec.uniform(num_hidden_layers=6, intermediate_size=32, num_groups=1)
    assert fresh_decoder(raw, 0, narrow).widths == narrow


def test_the_choice_is_the_best_of_what_fits(tmp_path: Path) -> None:
    s = tiny_setting(tmp_path)
    decoder = s.scratch(s.config.full_spec).requires_grad_(False)
    space = SearchSpace(num_hidden_layers=3, intermediate_sizes=(8, 16, 24, 32), num_groups=(1, 2))
    budget = sum(p.numel() for n, p in decoder.named_parameters() if n.startswith("layers.")) * 6 // 10
    tried = [choose(decoder, space, s.data.search_BT, budget, seed=0, effort=effort) for effort in (1, 12)]
    for spec in tried:
        assert spec in space
        held = s.scratch(spec)
        assert sum(p.numel() for n, p in held.named_parameters() if n.startswith("layers.")) <= budget
    few, many = (mean_loss(decoder, s.data.search_BT, spec) for spec in tried)
    assert many < few


def row(method: str, size: float, loss: float, num: int = 10) -> dict[str, Any]:
    return {"family": "llama", "seed": 0, "method": method, "size": size, "loss": loss, "block_params": num}


def test_a_claim_holds_only_with_less_loss_within_the_same_budget() -> None:
    ours = [row("Flextron", 1.0, 2.0, num=20), row("Flextron", 0.5, 2.5)]
    others = [
        row("base", 1.0, 2.1, num=20),
        row("end to end", 0.5, 2.6),
        row("MatFormer-type", 0.5, 2.4),
        row("SortedNet-type", 0.5, 2.7, num=9),  # which might have had 10
        row("Flextron, uniform", 0.5, 9.0),
    ]
    checked = {claim["against"]: claim for claim in claims(ours + others)}
    assert {name: claim["holds"] for name, claim in checked.items()} == {
        "base": True,
        "end to end": True,
        "MatFormer-type": False,
        "SortedNet-type": True,
    }
    larger = claims([row("Flextron", 0.5, 2.5, num=11), row("end to end", 0.5, 2.6), row("SortedNet-type", 0.5, 2.7)])
    assert not any(claim["holds"] for claim in larger)
    assert checked["MatFormer-type"]["margin"] == pytest.approx(-0.1)


class Interrupted(BaseException):
    """Stands in for a kill."""


def test_a_finished_run_is_never_repeated_and_a_failed_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = tiny_setting(tmp_path)
    trained: list[str] = []
    original = Setting.train

    def recorded(self: Setting, name: str, *arguments: Any, **options: Any) -> None:
        if name == "matformer" and "matformer" not in trained:
            trained.append(name)
            raise Interrupted
        trained.append(name)
        original(self, name, *arguments, **options)

    monkeypatch.setattr(Setting, "train", recorded)
    wanted = [job for job in plan.jobs(s) if job.name in ("base", "matformer", "minitron-0.6")]
    monkeypatch.setattr(plan, "jobs", lambda s: wanted)
    with pytest.raises(Interrupted):
        plan.execute(s)
    assert trained == ["base", "matformer"]
    plan.execute(s)
    assert trained == ["base", "matformer", "matformer", "minitron-0.6"]
    results = {job.name: s.store.result(job.name) for job in wanted}
    shutil.rmtree(s.store.path / "matformer")
    plan.execute(s)
    assert trained[4:] == ["matformer"]
    again = s.store.result("matformer")
    assert again is not None
    assert results["matformer"] is not None
    for a, b in zip(again["points"], results["matformer"]["points"], strict=True):
        assert a == pytest.approx(b, rel=1e-4) if "loss" not in a else a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert not list(s.store.path.glob("*.run"))


def finish(s: Setting, *names: str) -> None:
    for name in names:
        s.store.once(name, lambda: (s.scratch(s.config.full_spec), {"points": []}))


def test_runs_of_other_pretraining_settings_are_refused(tmp_path: Path) -> None:
    s = tiny_setting(tmp_path)
    finish(s, "base", "flextron")
    other = Setting.of(dataclasses.replace(TINY, lr={"llama": 1e-3}), "llama", 0, s.data, tmp_path)
    for name in ("base", "flextron"):
        with pytest.raises(FlextronError, match=rf"{name} ran with lr {TINY.lr['llama']} instead of 0.001"):
            other.store.result(name)


def test_pretraining_outlives_a_change_of_post_training_settings(tmp_path: Path) -> None:
    s = tiny_setting(tmp_path)
    finish(s, "base", "variant-0.6", "continued")
    changes = {
        "elastic_lr": {"llama": 1e-3},
        "elastic_batch_size": 4,
        "joint_fraction": 0.5,
        "num_candidates": 3,
        "name": "x",
    }
    other = Setting.of(dataclasses.replace(TINY, **changes), "llama", 0, s.data, tmp_path)
    assert other.store.result("base") == s.store.result("base") is not None
    assert other.store.result("variant-0.6") == s.store.result("variant-0.6") is not None
    with pytest.raises(FlextronError, match=r"elastic_lr.*--again"):
        other.store.result("continued")
    for name in ("base", "variant-0.6", "continued", "flextron"):
        other.store.discard_outdated(name)
    assert sorted(p.name for p in s.store.path.iterdir()) == ["base", "variant-0.6"]
    # nor does what a run is not about: other families, other seeds, and how the report is made
    widened = dataclasses.replace(TINY, seeds={"llama": 3, "gpt2": 1}, latency_repeats=9)
    assert Setting.of(widened, "llama", 0, s.data, tmp_path).store.result("base") is not None


PART = 'elastic_lr={"gpt2": 5e-4}'


def test_settings_can_be_changed_on_the_command_line() -> None:
    def parsed(*options: str) -> Scale:
        return scale_of(command_parser("x", None, scale="smoke").parse_args(options))

    scale = parsed("--scale", "cpu", "--set=num_candidates=4", "--set=lr=1e-3", "--set=sizes=[0.5]", "--set", PART)
    rates = {"llama": SCALES["cpu"].elastic_lr["llama"], "gpt2": 5e-4}
    by_family = {"lr": {"llama": 1e-3, "gpt2": 1e-3}, "elastic_lr": rates}
    assert scale == dataclasses.replace(SCALES["cpu"], num_candidates=4, sizes=(0.5,), **by_family)
    assert parsed(*command_options(scale)) == scale
    assert parsed() == SCALES["smoke"]
    for change in (
        "color=1",
        "lr",
        "lr=fast",
        "lr=true",
        'lr={"mamba": 1}',
        "elastic_batch_size=1.5",
        "name=1",
        "sizes=0.5",
    ):
        with pytest.raises(FlextronError, match=change.partition("=")[0]):
            parsed("--set", change)


def test_every_method_takes_the_same_tokens_from_the_same_base(tmp_path: Path) -> None:
    s = tiny_setting(tmp_path)
    plan.execute(s)
    budget = 0.0763 * TINY.tokens
    tokens = {}
    for job in plan.jobs(s):
        result = s.store.result(job.name)
        assert result is not None
        tokens[job.name] = result["tokens"]
        for point in result["points"]:
            assert point["block_params"] <= s.budgets.get(point["size"], point["block_params"]), job.name
            if point["size"] < 1:
                decoder = s.store.decoder(job.name, s.config)
                loss = mean_loss(decoder, s.data.validation_BT, SubnetSpec.from_dict(point["spec"]))
                static = point.get("static_loss", point["loss"])  # tokens routed by themselves lose something else
                assert loss == pytest.approx(static, rel=1e-5), "the weights are those that were scored"
    ended = {name: n for name, n in tokens.items() if name.startswith(("base", "variant"))}
    assert set(ended.values()) == {TINY.tokens // 256 * 256}
    del tokens["flextron-elastic"]
    shared = [tokens.pop(name) for name in list(tokens) if name.startswith("minitron-shared")]
    assert len(shared) == len(TINY.sizes)
    assert budget - 256 * len(shared) < sum(shared) <= budget
    whole = {n for name, n in tokens.items() if name not in ended}
    assert len(whole) == 1
    assert budget - 256 < whole.pop() <= budget
    assert {f"ablation-{name}" for name in methods.ABLATIONS} < tokens.keys()


@pytest.mark.slow
def test_the_smoke_scale_runs_end_to_end(tmp_path: Path) -> None:
    text = corpus(tmp_path / "text.jsonl", 2000)
    reproduce(SCALES["smoke"], str(text), tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["versions"]["torch"] == torch.__version__
    compared = {(c["against"], c["size"]) for c in results["claims"]}
    minitron = ("Minitron-type", "Minitron-type, shared tokens")
    peers = ("end to end", "MatFormer-type", "SortedNet-type", *minitron)
    assert compared == {("base", 1.0), *((p, size) for p in peers for size in SCALES["smoke"].sizes)}
    table = (tmp_path / "out" / "results.md").read_text()
    for r in results["summary"]:
        assert f"{r['loss']:.4f}" in table
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("model.safetensors")}
    reproduce(SCALES["smoke"], str(text), tmp_path / "out")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("model.safetensors")}


@pytest.mark.slow
def test_the_asset_is_an_elastic_checkpoint_with_the_losses_on_its_card(tmp_path: Path) -> None:
    s = tiny_setting(tmp_path)
    with pytest.raises(FlextronError, match="no finished run"):
        write_asset(TINY, tmp_path, tmp_path / "asset", text="words")
    wanted = [job for job in plan.jobs(s) if job.name in ("base", "flextron-elastic", "flextron")]
    for job in wanted:
        s.store.once(job.name, lambda job=job: job.run(s, job.name))  # type: ignore[misc]
    write_asset(TINY, tmp_path, tmp_path / "asset", text="words")
    model = flextron.load(tmp_path / "asset")
    card = (tmp_path / "asset" / "README.md").read_text()
    assert "words" in card
    assert str(tmp_path) not in card + (tmp_path / "asset" / "elastic.json").read_text()
    for point in model.info.recipe["points"]:
        loss = mean_loss(model.decoder.cpu(), s.data.validation_BT, SubnetSpec.from_dict(point["spec"]))
        assert f"{loss:.4f}" in card
