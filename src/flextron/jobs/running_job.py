"""One job in training: a trainer, and what each of its steps leaves on the disk, in an order that survives a crash.

After a step: the adapter, if one is due, then the step in the database, then the trainer's state. A process that is
killed in between takes the same steps again and finds what is there already. Nobody is told of an adapter before the
database is, and the database is told only of whole ones.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence

from flextron.files import durable_directory
from flextron.finetuning.trainer import MakeTrainer, StepMetrics, TrainingTask
from flextron.jobs.directory import StateDirectory
from flextron.jobs.loader import Prepared
from flextron.jobs.records import Job
from flextron.jobs.repository import JobRepository
from flextron.jobs.uploads import RESULTS, Uploads

__all__ = ["RunningJob"]

_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy", "num_tokens")


class RunningJob:
    """Belongs to the thread that takes the steps."""

    def __init__(
        self,
        job: Job,
        prepared: Prepared,
        make_trainer: MakeTrainer,
        directory: StateDirectory,
        repository: JobRepository,
        uploads: Uploads,
    ) -> None:
        """Make the trainer, where the saved state ends.

        Raises:
            FlextronError: the job's hyperparameters do not go with the model.
        """
        self.job, self._directory, self._repository, self._uploads = job, directory, repository, uploads
        state = directory.state(job.id)
        (directory.jobs / job.id).mkdir(exist_ok=True)
        task = TrainingTask(
            hyperparameters=job.hyperparameters,
            examples=prepared.examples,
            validation=prepared.validation,
            seed=job.seed,
            spec=job.spec,
            resume=state if state.exists() else None,
        )
        self.trainer = make_trainer(task)
        self.has_stepped = False
        """Whether a step since the start has been taken, or given up."""
        self._saved_at = self._begun_at = time.monotonic()
        self._begun_with = self.trainer.step_number

    def record(self, metrics: StepMetrics, save_seconds: float) -> int | None:
        """Keep what the trainer's last step gave.

        Args:
            metrics: metrics of the step.
            save_seconds: the time after which the state is saved again.

        Returns:
            The step, if there is a new adapter of it.

        Raises:
            FlextronError: a loss is no number.
            NoSpaceError: the disk is full; all is as after the last saved state.
        """
        step, num_steps = self.trainer.step_number, self.trainer.num_steps
        metrics.check(step)
        is_last = step >= num_steps
        is_due = is_last or self.job.hyperparameters.has_checkpoint(step)
        # after a crash it may be there already, and others may use it
        has_adapter = is_due and not self._repository.had_checkpoint(self.job.id, step)
        if has_adapter:
            with durable_directory(self._directory.adapter(self.job.id, step)) as temporary:
                self.trainer.save_adapter(temporary)
        if is_last:
            return step if self._finish(step, metrics) else None
        if not self._repository.record(self.job, step, metrics, num_steps=num_steps, has_adapter=has_adapter):
            return None
        if time.monotonic() - self._saved_at >= save_seconds:
            self.save()
        return step if has_adapter else None

    def save(self) -> None:
        """Save the trainer's state.

        Raises:
            NoSpaceError: the disk is full; the state saved before is still there.
        """
        with durable_directory(self._directory.state(self.job.id)) as temporary:
            self.trainer.save_state(temporary)
        self._saved_at = time.monotonic()

    def forget(self) -> None:
        """Remove the saved state of a job that has ended."""
        self._directory.remove_state(self.job.id)

    def estimated_finish(self) -> int | None:
        """Unix time at the pace since the last start; None before a step."""
        done = self.trainer.step_number - self._begun_with
        if done <= 0:
            return None
        seconds = (time.monotonic() - self._begun_at) / done
        return int(time.time() + seconds * (self.trainer.num_steps - self.trainer.step_number))

    def _finish(self, step: int, metrics: StepMetrics) -> bool:
        steps = [s for s in self._repository.steps(self.job.id) if s[0] < step]
        table = _table([*steps, (step, metrics)])
        result = self._uploads.write("step_metrics.csv", RESULTS, [table.encode()])
        done = self._repository.finish(self.job, step, metrics, result)
        if not done:
            self._directory.file(result.id).unlink()
        return done


def _table(steps: Sequence[tuple[int, StepMetrics]]) -> str:
    """OpenAI's columns, empty where nothing was measured, and the tokens of each step."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for step, metrics in steps:
        valid = (metrics.valid_loss, metrics.valid_accuracy)
        writer.writerow([step, metrics.loss, metrics.accuracy, *valid, metrics.num_tokens])
    return out.getvalue()
