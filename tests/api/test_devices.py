"""Devices and types of numbers: what is named when a model is loaded, what runs in it, and what is refused."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import flextron
from flextron.cli.main import app
from flextron.finetuning.example import Example
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.lora import LoraTrainers
from flextron.finetuning.trainer import TrainingTask
from flextron.generation.generate import SamplingParams
from flextron.model.batch import Batch
from flextron.routing.device import Precision
from tests.checkpoints.families_cases import relative_error

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@without_gpu
@pytest.mark.parametrize(("device", "said"), [("cuda", "is not here"), ("cuda:7", "is not here"), ("gpu", "must be")])
def test_devices_that_are_not_here_are_named(device: str, said: str) -> None:
    with pytest.raises(flextron.FlextronError, match=said):
        flextron.load("tiny", device=device)


def test_types_that_models_do_not_run_in_are_refused() -> None:
    with pytest.raises(flextron.FlextronError, match="must be one of float32, bfloat16, float16"):
        flextron.load("tiny", dtype="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "bar"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_an_engine_of_fewer_bits_scores_as_the_float32_model_does(dtype: Precision, bar: float) -> None:
    """Log-probabilities of a prompt and its answer, through pages of that type."""
    exact, low = flextron.load("tiny", device="cpu"), flextron.load("tiny", device="cpu", dtype=dtype)
    engine = flextron.Engine(low, kv_cache_gb=0.01)
    assert engine.core.runner._paged.cache.dtype == low.decoder.dtype == getattr(torch, dtype)
    (answer,) = engine.generate("Once upon a time", SamplingParams(max_tokens=9, logprobs=0))
    prompt = exact.tokenizer("Once upon a time")["input_ids"]
    ids = torch.tensor([[*prompt, *answer.token_ids]])
    with torch.no_grad():
        scores = exact.decoder.logits(exact.decoder(Batch.padded(ids, exact.space.full))).log_softmax(-1)
    wanted = scores[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
    assert answer.logprobs is not None
    assert relative_error(torch.tensor([entry.chosen for entry in answer.logprobs]), wanted) < bar


def test_adapters_train_beside_weights_of_fewer_bits() -> None:
    model = flextron.load("tiny", device="cpu", dtype="bfloat16")
    rows = [model.tokenizer(f"The answer to {i} is blue.")["input_ids"] for i in range(4)]
    task = TrainingTask(
        hyperparameters=Hyperparameters(n_epochs=12, batch_size=4, rank=4, learning_rate=5e-3),
        examples=[Example(row, [1.0] * len(row)) for row in rows],
        seed=0,
    )
    trainer = LoraTrainers(model.decoder, "tiny")(task)
    losses = [trainer.step().loss for _ in range(trainer.num_steps)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype == torch.float32 for p in trainer.adapter.parameters())


def test_weights_of_fewer_bits_do_not_train_and_are_not_quantized() -> None:
    model = flextron.load("tiny", device="cpu", dtype="bfloat16")
    with pytest.raises(flextron.FlextronError, match="training changes float32 weights"):
        model.train(["a text"])
    with pytest.raises(flextron.FlextronError, match=r"iteration only, and the weights are torch\.bfloat16"):
        flextron.Engine(model, weights="int8")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        pytest.param(["--device", "cuda"], "device cuda is not here", marks=without_gpu),
        (["--device", "tpu9"], "device must be cpu, cuda or cuda:N"),
        (["--device", "cpu", "--dtype", "bfloat16", "--weights", "int8"], "leave them out"),
    ],
)
def test_a_server_refuses_what_it_cannot_run_on(options: list[str], sentence: str) -> None:
    done = CliRunner().invoke(app, ["serve", "tiny", *options])
    assert done.exit_code == 2
    assert sentence in " ".join(done.stderr.split())
