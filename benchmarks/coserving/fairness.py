"""Several finetuning jobs at once."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.coserving.models import tiny_decoder
from benchmarks.harness import Figure
from flextron.api import load
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.lora import LoraTrainers
from flextron.jobs.driver import TrainingDriver
from flextron.jobs.jobs import Jobs, JobsSettings
from flextron.workflows.tiny import tiny_model

__all__ = ["fair_jobs"]


def fair_jobs() -> Figure:
    """Eight jobs at once."""
    decoder, count = tiny_decoder(), 8
    tokenizer = load(tiny_model()).tokenizer
    assert tokenizer is not None
    with tempfile.TemporaryDirectory() as directory:
        jobs = Jobs(
            Path(directory),
            model="tiny",
            tokenizer=tokenizer,
            context=decoder.config.max_position_embeddings,
            make_trainer=LoraTrainers(decoder, "tiny", pack_tokens=256),
            settings=JobsSettings(max_training=count),
        )
        made = []
        for k in range(count):
            lines = [{"prompt": f"{k} and {i} are", "completion": " " + "so " * (5 + 3 * k)} for i in range(64)]
            content = "".join(json.dumps(line) + "\n" for line in lines).encode()
            file = jobs.uploads.add("train.jsonl", "fine-tune", [content])
            chosen = Hyperparameters(n_epochs=500, batch_size=2 + k % 3, rank=4 + k)
            made.append(jobs.create(training_file=file.id, hyperparameters=chosen, seed=k).id)
        driver = TrainingDriver(jobs)
        driver.start()
        deadline = time.monotonic() + 90.0
        tokens = [0]
        while time.monotonic() < deadline and min(tokens) < 8_000:
            if driver.unit is None:
                time.sleep(0.001)
            else:
                driver.run_unit(512)
            if random.random() < 0.01:
                tokens = [sum(m.num_tokens for _, m in jobs.repository.steps(job)) for job in made]
        driver.stop()
        jobs.close()
    mean = statistics.fmean(tokens)
    return Figure(
        name=f"{count} jobs at once: largest deviation of a job's tokens from their mean",
        value=100 * max(abs(t / mean - 1) for t in tokens),
        unit="%",
        op="<=",
        bar=10,
        note=f"{mean:.0f} tokens each, of other lengths, batches and ranks, on the tiny model",
    )
