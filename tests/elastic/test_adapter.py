"""Elastic adapters: what they add is what training added, on disk and beside their base, and no other base is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flextron
from flextron.elastic.adapter import ElasticAdapter, norm_parameters, sharing
from flextron.elastic.sketch import check_sketch, sketch
from flextron.errors import FlextronError
from flextron.model.batch import Batch
from tests.checkpoints.families_cases import MECHANISMS, random_model, random_tokens, stock
from tests.model.adapter_cases import merged, randomize
from tests.random_decoders import random_decoder
from tests.tiny import make_tiny_llama
from tests.toy import prose


def random_adapter(decoder: torch.nn.Module, seed: int = 0) -> ElasticAdapter:
    adapter = ElasticAdapter.fresh(decoder, 2, 3.0)
    randomize(adapter.lora, seed)
    generator = torch.Generator().manual_seed(seed)
    for norm in adapter.norms.values():
        norm.copy_(0.1 * torch.randn(norm.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("case", MECHANISMS)
def test_merging_does_what_the_adapter_beside_the_base_does(case: str) -> None:
    base = random_decoder(case).double()
    adapter = random_adapter(base)
    adapter.lora.double()
    student = sharing(base)
    adapter.set_norms(student, base)
    batch = Batch.padded(random_tokens(2, 6), base.widths)
    beside = Batch.dealt(random_tokens(2, 6), [base.widths], adapter=adapter.lora)
    untouched = base(batch)
    right = merged(student, adapter.lora).double()(batch)
    # norms of a student are float32
    torch.testing.assert_close(student.double()(beside), right, rtol=5e-6, atol=5e-6)
    adapter.add_to(base)
    torch.testing.assert_close(base(batch), right, rtol=5e-6, atol=5e-6)
    adapter.add_to(base, -1)
    torch.testing.assert_close(base(batch), untouched, rtol=1e-12, atol=1e-12)


def test_a_sharing_decoder_has_its_own_norms_and_nothing_else() -> None:
    base = random_decoder("llama")
    student = sharing(base)
    own = norm_parameters(student).keys()
    for (name, ours), theirs in zip(student.named_parameters(), base.parameters(), strict=True):
        assert (ours is theirs) == (name not in own)


def model_of(path: Path) -> flextron.ElasticModel:
    return flextron.convert(path, calibration=[prose()], num_calibration_tokens=512, context=64)


def recipe(**changes: object) -> flextron.TrainRecipe:
    values = {"tokens": 1024, "context": 32, "batch_size": 4, "micro_batch_size": 4, "lora_rank": 4, "lr": 5e-3}
    return flextron.TrainRecipe(**values | changes)


@torch.no_grad()
def outputs(model: flextron.ElasticModel) -> list[Tensor]:
    specs = [model.space.full, model.space.smallest]
    return [model.decoder(Batch.padded(random_tokens(2, 8), spec)) for spec in specs]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "model"
    make_tiny_llama(path)
    return path


@pytest.fixture(scope="module")
def trained(base: Path) -> flextron.ElasticModel:
    model = model_of(base)
    model.train([prose()], recipe())
    return model


def test_training_an_adapter_changes_the_model_by_the_adapter_alone(base: Path, trained: flextron.ElasticModel) -> None:
    fresh = model_of(base)
    before = outputs(fresh)
    assert trained.adapter is not None
    trained.adapter.add_to(fresh.decoder)
    for ours, theirs, untrained in zip(outputs(fresh), outputs(trained), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert (theirs - untrained).abs().max() > 1e-3


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 2e-3), (8, 3e-2)])
def test_an_adapter_comes_back_beside_its_base(
    base: Path, trained: flextron.ElasticModel, tmp_path: Path, bits: int, tolerance: float
) -> None:
    trained.save_adapter(tmp_path / "adapter", bits=bits)
    for back in (flextron.load(base, elastic=tmp_path / "adapter"), flextron.load(tmp_path / "adapter")):
        for ours, theirs in zip(outputs(back), outputs(trained), strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm()
    back.save(tmp_path / "merged")
    for ours, theirs in zip(outputs(flextron.load(tmp_path / "merged")), outputs(back), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    hf = stock(tmp_path / "merged")
    with torch.no_grad():
        logits = hf(random_tokens(2, 8)).logits.flatten(0, 1)
    torch.testing.assert_close(logits, back.decoder.logits(outputs(back)[0]), rtol=1e-4, atol=1e-4)


def test_training_goes_on_from_a_loaded_adapter(base: Path, trained: flextron.ElasticModel, tmp_path: Path) -> None:
    trained.save_adapter(tmp_path / "adapter")
    back = flextron.load(base, elastic=tmp_path / "adapter")
    before = outputs(back)
    result = back.train([prose()], recipe(lr=1e-9))
    for ours, theirs in zip(outputs(back), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert back.info.recipe["num_tokens"] == 2 * result.num_tokens
    with pytest.raises(FlextronError, match="rank 4"):
        back.train([prose()], recipe(lora_rank=2))


def test_another_base_is_refused(base: Path, trained: flextron.ElasticModel, tmp_path: Path) -> None:
    trained.save_adapter(tmp_path / "adapter")
    other = stock(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(FlextronError, match="other weights"):
        flextron.load(tmp_path / "other", elastic=tmp_path / "adapter")
    random_model("qwen3").save_pretrained(tmp_path / "wider")
    with pytest.raises(FlextronError, match="of another"):
        flextron.load(tmp_path / "wider", elastic=tmp_path / "adapter")


def test_an_elastic_checkpoint_can_be_a_base_too(trained: flextron.ElasticModel, tmp_path: Path) -> None:
    trained.save(tmp_path / "elastic")
    again = model_of(tmp_path / "elastic")
    again.train([prose()], recipe(tokens=128))
    again.save_adapter(tmp_path / "adapter")
    back = flextron.load(tmp_path / "elastic", elastic=tmp_path / "adapter")
    for ours, theirs in zip(outputs(back), outputs(again), strict=True):
        assert (ours - theirs).norm() <= 2e-3 * theirs.norm()


def test_the_same_weights_in_fewer_digits_are_the_same_base() -> None:
    decoder = random_decoder("llama")
    wanted = sketch(decoder)
    check_sketch(decoder.bfloat16(), wanted, "it")
    for parameter in decoder.float().parameters():
        parameter.mul_(1.1)
    with pytest.raises(FlextronError, match="other weights"):
        check_sketch(decoder, wanted, "it")


def test_what_cannot_be_saved_says_so(base: Path, tmp_path: Path) -> None:
    model = model_of(base)
    with pytest.raises(FlextronError, match="no elastic adapter"):
        model.save_adapter(tmp_path / "adapter")
    model.train([prose()], recipe(tokens=128, lora_rank=None))
    assert model.adapter is None


def test_a_frontier_travels_without_its_latencies(base: Path, trained: flextron.ElasticModel, tmp_path: Path) -> None:
    settings = flextron.SearchSettings(targets=(0.8,), rounds=1, refinements=0, num_uniform=2)
    frontier = trained.profile([prose(seed=1)], settings=settings, num_tokens=128, context=32)
    trained.save_adapter(tmp_path / "adapter")
    assert "latency" not in json.loads((tmp_path / "adapter" / "losses.json").read_text())["points"][0]
    back = flextron.load(base, elastic=tmp_path / "adapter")
    again = back.profile()
    assert {p.spec: p.loss for p in again.points} == {p.spec: p.loss for p in frontier.points}
    assert again.device == frontier.device
