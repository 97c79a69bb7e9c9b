"""Writes what later versions must read: `python -m tests.stored.make` makes `tests/stored/VERSION`.

It is run once for each version that changes a format, and what it wrote is never written again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import flextron
from flextron import ElasticModel, SearchSettings, SubnetSpec, TrainRecipe
from flextron.finetuning.lora import LoraTrainers
from flextron.model.batch import Batch
from flextron.workflows.tiny import tiny_model
from tests.jobs.making import RECORDS, jsonl, new_jobs, settled, step, train

__all__ = ["HERE", "TOKENS", "logits"]

HERE = Path(__file__).parent
TOKENS = [5, 17, 3, 99, 42, 8]
_TEXT = "Once upon a time a small model learned to be smaller still, and then it was asked again. " * 40


def logits(model: ElasticModel, specs: dict[str, SubnetSpec]) -> dict[str, torch.Tensor]:
    """Logits after some tokens in each sub-network, (T, vocabulary)."""
    with torch.no_grad():
        return {
            name: model.decoder.logits(model.decoder(Batch.padded(torch.tensor([TOKENS]), spec)))
            for name, spec in specs.items()
        }


def _base(directory: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    """Write one of each."""
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)  # so that the names that are stored are relative ones
        _write(Path(version("flextron")))
        shutil.copytree(version("flextron"), HERE / version("flextron"))


def _write(out: Path) -> None:
    _base(out / "base")
    model = flextron.convert(
        out / "base", calibration=[_TEXT], ratios=(0.5, 1.0), multiple_of=8, num_calibration_tokens=512, context=32
    )
    settings = SearchSettings(targets=(0.8,), rounds=1, refinements=0, num_uniform=2)
    model.profile([_TEXT], num_tokens=256, context=32, settings=settings)
    model.save(out / "checkpoint")
    recipe = TrainRecipe(tokens=1024, context=32, batch_size=4, micro_batch_size=4, lora_rank=2, lr=1e-2)
    model.train([_TEXT], recipe)
    model.save_adapter(out / "elastic-adapter", bits=8)
    stored = flextron.load(out / "checkpoint")
    Path("data.jsonl").write_bytes(jsonl(RECORDS))
    flextron.finetune(out / "checkpoint", "data.jsonl", out / "adapter", n_epochs=1, rank=2)
    jobs = new_jobs(out / "state", LoraTrainers(stored.decoder, "tiny"))
    settled(jobs, suffix="done", rank=2)
    train(jobs)
    paused = settled(jobs, suffix="paused", rank=2)
    step(jobs)
    jobs.pause(paused.id)
    train(jobs)
    jobs.close()
    specs = {"full": model.space.full, "smallest": model.space.smallest}
    loaded = {"checkpoint": stored, "elastic-adapter": flextron.load(out / "base", elastic=out / "elastic-adapter")}
    found = {f"{kind}.{name}": t.contiguous() for kind, m in loaded.items() for name, t in logits(m, specs).items()}
    save_file(found, out / "expected.safetensors")
    written = {name: spec.to_dict() for name, spec in specs.items()}
    (out / "specs.json").write_text(json.dumps(written), encoding="utf-8")


if __name__ == "__main__":
    main()
