"""Finetuning an adapter without a server: what `flextron.finetune` does.

Everything that a restart needs lies in `<output>.run` until the adapter is whole: what is trained, the trainer's last
state, and the steps up to it.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flextron.api.checkpoint import load
from flextron.api.model import ElasticModel
from flextron.api.texts import needed
from flextron.checkpoints.origin import PermutedFrom
from flextron.errors import FlextronError
from flextron.files import checked, durable_directory, lock_directory, read_json, write_json
from flextron.finetuning.dataset import Dataset, DatasetError, read_dataset
from flextron.finetuning.hyperparameters import Hyperparameters
from flextron.finetuning.lora import LoraTrainers
from flextron.finetuning.trainer import StepMetrics, Trainer, TrainingTask
from flextron.interrupts import Interrupted, held_interrupts
from flextron.progress import OnStep
from flextron.spec import SubnetSpec, Target

__all__ = ["FIGURES_FILE", "FinetuneResult", "finetune"]

FIGURES_FILE = "finetuning.json"
_IDENTITY, _STATE, _TRAINER, _PROGRESS = "run.json", "state", "trainer", "progress.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneResult:
    """What came out, and what it took."""

    adapter: Path
    """The adapter's directory, in peft's layout; `finetuning.json` in it holds these figures."""
    spec: SubnetSpec
    """The sub-network that it was trained in."""
    num_examples: int
    num_truncated: int
    """Examples that lost their end."""
    num_steps: int
    num_tokens: int
    """Tokens that went through forward and backward."""
    seconds: float
    """Seconds of training, those before a restart included."""
    losses: tuple[float, ...]
    """Loss of each step: means over the trained tokens, in nats."""
    validations: tuple[tuple[int, float, float], ...] = ()
    """Steps after which the validation file was scored, each with the mean loss and the share of right tokens."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained per second."""
        return self.num_tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        written = {"adapter": str(self.adapter), "spec": self.spec.to_dict()}
        return asdict(self) | written | {"tokens_per_second": self.tokens_per_second}


def finetune(
    model: ElasticModel | str | Path,
    data: str | Path,
    output: str | Path,
    *,
    target: Target | None = None,
    validation: str | Path | None = None,
    seed: int = 0,
    restart: bool = False,
    save_seconds: float = 30.0,
    on_step: OnStep = lambda done, total, figures: None,
    **hyperparameters: Any,
) -> FinetuneResult:
    """Train a LoRA adapter beside a frozen model; goes on after a kill when it is called again.

    Args:
        model: an elastic model, or where to load one.
        data: JSONL: `{"messages": […]}` or `{"prompt", "completion"}` in each line.
        output: directory to make for the adapter; its unfinished training lies in `<output>.run`.
        target: trains in the sub-network for it, and so for narrower ones; by default in the full one. The adapter
            goes with all of them in any case.
        validation: JSONL of the same form, scored at the end of each epoch.
        seed: seed of initial weights and data order.
        restart: whether to drop what lies in both directories, and start again.
        save_seconds: between two saved states.
        on_step: told of progress.
        hyperparameters: `n_epochs`, `batch_size`, `learning_rate`, `rank` and the other fields of `Hyperparameters`.

    Raises:
        FlextronError: a file or a hyperparameter is no good, `output` exists, or an unfinished training there is of
            other arguments, or nothing is within the target.
    """
    if not 0 <= seed < 2**31:  # as the server's
        raise FlextronError(f"seed must lie between 0 and {2**31 - 1}, not be {seed}")
    chosen = Hyperparameters.from_dict(hyperparameters)
    data, output = Path(data).expanduser(), Path(output).expanduser()
    held_out = None if validation is None else Path(validation).expanduser()
    for path in (data, held_out):
        if path is not None and not path.is_file():
            raise FlextronError(f"{path} is not a file; give a JSONL file of examples")
    if output.exists() and not restart:
        raise FlextronError(f"{output} exists already; choose another directory, or pass restart (--restart)")
    source = str(model) if isinstance(model, (str, Path)) else model.info.provenance.get("source", "")
    loaded = model if isinstance(model, ElasticModel) else load(model)
    spec = loaded.space.full if target is None else loaded.best(target).spec
    identity = {
        "model": source,
        "data": _digest(data),
        "validation": None if held_out is None else _digest(held_out),
        "seed": seed,
        "hyperparameters": chosen.to_dict(),
        "spec": spec.to_dict(),
    }
    dataset = _examples(loaded, data, chosen)
    scored = () if held_out is None else _examples(loaded, held_out, chosen).examples
    directory = output.with_name(output.name + ".run")
    directory.mkdir(parents=True, exist_ok=True)
    with lock_directory(directory):
        _begin(directory, identity, restart=restart)
        state = directory / _STATE
        is_resumed = state.exists()
        progress = _read_progress(state / _PROGRESS) if is_resumed else _Progress()
        trainers = LoraTrainers(loaded.decoder, _base_name(model, loaded))
        task = TrainingTask(
            hyperparameters=chosen,
            examples=dataset.examples,
            validation=scored,
            seed=seed,
            spec=spec,
            resume=state / _TRAINER if is_resumed else None,
        )
        trainer = trainers(task)
        _train(trainer, progress, state, save_seconds, on_step)
        result = FinetuneResult(
            adapter=output,
            spec=spec,
            num_examples=len(dataset.examples),
            num_truncated=dataset.num_truncated,
            num_steps=trainer.num_steps,
            num_tokens=progress.num_tokens,
            seconds=progress.seconds,
            losses=tuple(progress.losses),
            validations=tuple((step, loss, accuracy) for step, loss, accuracy in progress.validations),
        )
        with durable_directory(output) as temporary:
            trainer.save_adapter(temporary)
            write_json(temporary / FIGURES_FILE, result.to_dict() | {"run": identity})
        shutil.rmtree(directory)
    return result


def _base_name(given: ElasticModel | str | Path, loaded: ElasticModel) -> str:
    """The elastic checkpoint by its directory, as far as it has one: never the original, whose weights are ordered."""
    origin = loaded.decoder.config.origin
    known = origin.directory if isinstance(origin, PermutedFrom) else None
    return str((known or "") if isinstance(given, ElasticModel) else given)


@dataclass(slots=True)
class _Progress:
    """The steps up to a state."""

    losses: list[float] = field(default_factory=list)
    num_tokens: int = 0
    seconds: float = 0.0
    validations: list[tuple[int, float, float]] = field(default_factory=list)

    def add(self, metrics: StepMetrics, seconds: float) -> None:
        self.losses.append(metrics.loss)
        if metrics.valid_loss is not None and metrics.valid_accuracy is not None:
            self.validations.append((len(self.losses), metrics.valid_loss, metrics.valid_accuracy))
        self.num_tokens += metrics.num_tokens
        self.seconds += seconds


def _read_progress(path: Path) -> _Progress:
    return checked(_Progress, read_json(path), str(path), "pass restart (--restart) to start again")


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def _examples(model: ElasticModel, data: Path, hyperparameters: Hyperparameters) -> Dataset:
    config = model.decoder.config
    try:
        return read_dataset(
            data, needed(model.tokenizer), hyperparameters, config.max_position_embeddings, config.vocab_size
        )
    except DatasetError as error:
        raise FlextronError(f"{data}: {error}") from error


def _begin(directory: Path, identity: dict[str, Any], *, restart: bool) -> None:
    """See that what lies in the run's directory is of the same run, or nothing."""
    path = directory / _IDENTITY
    if restart:
        shutil.rmtree(directory / _STATE, ignore_errors=True)
    elif path.exists():
        found = read_json(path)
        changed = [key for key in identity if found.get(key) != identity[key]]
        if changed:
            raise FlextronError(
                f"{directory} holds an unfinished training that differs in {', '.join(changed)}; repeat its command, "
                "choose another output, or pass restart (--restart)"
            )
    write_json(path, identity)


def _train(trainer: Trainer, progress: _Progress, state: Path, save_seconds: float, on_step: OnStep) -> None:
    """Take the steps that are left."""
    saved_at = time.monotonic()
    with held_interrupts() as interrupted:
        while trainer.step_number < trainer.num_steps:
            figures = _step(trainer, progress)
            on_step(trainer.step_number, trainer.num_steps, figures)
            if interrupted() or time.monotonic() - saved_at >= save_seconds:
                with durable_directory(state) as temporary:
                    (temporary / _TRAINER).mkdir()
                    trainer.save_state(temporary / _TRAINER)
                    write_json(temporary / _PROGRESS, asdict(progress))
                saved_at = time.monotonic()
                if interrupted():
                    raise Interrupted(trainer.step_number, trainer.num_steps, state.parent)


def _step(trainer: Trainer, progress: _Progress) -> dict[str, float]:
    """Take a step; its figures."""
    begun = time.perf_counter()
    metrics = trainer.step()
    seconds = time.perf_counter() - begun
    metrics.check(trainer.step_number)
    progress.add(metrics, seconds)
    figures = {"loss": metrics.loss, "tokens/s": metrics.num_tokens / max(seconds, 1e-9)}
    if metrics.valid_loss is not None:
        figures["validation loss"] = metrics.valid_loss
    return figures
