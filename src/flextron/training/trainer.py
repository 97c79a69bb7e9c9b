"""Elastic continued training: sub-networks of one set of weights, distilled from the frozen original (Flextron, 3.2).

A micro batch's sequences are dealt to several sub-networks that run in one nested pass; the teacher runs once. The same
call trains on one device or on many, where a launcher started several processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flextron.interrupts import Interrupted, held_interrupts
from flextron.model.adapter import Adapter
from flextron.model.decoder import Decoder
from flextron.parallel.processes import LostProcessError, Processes, is_loss
from flextron.progress import OnStep
from flextron.spec import SearchSpace, SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.dealing import RoutedDraw, RouterSampler
from flextron.training.recipe import TrainRecipe
from flextron.training.run import TrainingRun
from flextron.training.state import RunDirectory

__all__ = ["RoutedDraw", "RouterSampler", "TrainResult", "TrainingRun", "train"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a run did."""

    num_steps: int
    num_tokens: int
    """Tokens of text, each counted once, resumed steps included."""
    seconds: float
    """Seconds of this process; steps before a resume are not included."""
    tokens_per_second: float
    """Over this process's steps."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Losses of every step."""


def train(
    decoder: Decoder,
    teacher: Decoder | None,
    space: SearchSpace,
    blocks: TokenBlocks,
    recipe: TrainRecipe,
    *,
    specs: Sequence[SubnetSpec] = (),
    routing: RouterSampler | None = None,
    adapter: Adapter | None = None,
    run_directory: Path | None = None,
    identity: dict[str, Any] | None = None,
    on_step: OnStep | None = None,
) -> TrainResult:
    """Train the sub-networks of a decoder, in place.

    Args:
        decoder: the full, permuted model; float32.
        teacher: the frozen original, a model of its own; None where the recipe trains on the text alone.
        space: sub-networks to draw from.
        blocks: training text.
        recipe: all settings.
        specs: the sub-networks to train, each as often as the others; drawn by the recipe if none are given.
        routing: draws them instead, and trains its router along with the model.
        adapter: trained, with the decoder's norms, in the place of its weights, which stay as they are.
        run_directory: where resumable states go; without one, a killed run is lost.
        identity: facts beside the recipe that a resumed run must share (source of text and model).
        on_step: called after every step with the steps done, the steps in all, and the losses.

    Raises:
        FlextronError: the batch does not divide, there is no teacher where the recipe needs one, a given sub-network
            is none of the decoder's, the gradient is not finite, or the directory holds another run.
    """
    directory = None
    if run_directory is not None:
        facts = {"recipe": recipe.model_dump(mode="json"), "specs": [spec.to_dict() for spec in specs]}
        directory = RunDirectory(run_directory, facts | (identity or {}))
        directory.forget_finished()
    run = TrainingRun(decoder, teacher, space, blocks, recipe, directory, specs, routing, adapter)
    restored = None if directory is None else directory.load(run.trained, run.optimizer)
    done, history = restored or (0, list[dict[str, float]]())
    decoder.train()
    started = time.monotonic()
    _Loop(run, directory, on_step, history, saved=done).go()
    seconds = time.monotonic() - started
    tokens_per_step = recipe.batch_size * blocks.context
    _release(decoder)
    return TrainResult(
        num_steps=run.num_steps,
        num_tokens=run.num_steps * tokens_per_step,
        seconds=seconds,
        tokens_per_second=(run.num_steps - done) * tokens_per_step / max(seconds, 1e-9),
        history=history,
    )


@dataclass
class _Loop:
    """The steps that are left of a run, with its states on disk."""

    run: TrainingRun
    directory: RunDirectory | None
    on_step: OnStep | None
    history: list[dict[str, float]]
    """Losses of the steps that are done."""
    saved: int
    """Steps of the state on disk."""

    @property
    def _processes(self) -> Processes:
        return self.run.processes

    def go(self) -> None:
        """Run them all; the caller's modules have their parameters back afterwards.

        Raises:
            LostProcessError: another process is gone.
            Interrupted: Ctrl-C, or a launcher's SIGTERM, after a state was saved.
        """
        holds = self.directory is not None
        held = held_interrupts(launched=self._processes.are_several) if holds else nullcontext(lambda: False)
        try:
            with held as interrupted:
                self._steps(interrupted)
            self.run.finish()
        except (Interrupted, LostProcessError):
            raise
        except RuntimeError as error:
            if not (self._processes.are_several and is_loss(error)):
                raise
            raise LostProcessError(self._lost()) from error

    def _steps(self, interrupted: Callable[[], bool]) -> None:
        run, last_saved = self.run, time.monotonic()
        for step in range(len(self.history), run.num_steps):
            self.history.append(run.step(step))
            if self.on_step is not None and self._processes.is_first:
                self.on_step(step + 1, run.num_steps, self.history[-1])
            if self.directory is None:
                continue
            now = time.monotonic()
            is_due = now - last_saved > 60 * run.recipe.checkpoint_minutes and step + 1 < run.num_steps
            saves, stops = self._agreed(is_due and self._processes.is_first, interrupted())
            if saves or stops:
                self.directory.save(step + 1, run.trained, run.optimizer, self.history)
                self.saved, last_saved = step + 1, time.monotonic()
            if stops:
                run.finish()
                raise Interrupted(step + 1, run.num_steps, self.directory.path)

    def _agreed(self, *wishes: bool) -> list[bool]:
        """What any of the processes wishes; all do it after the same step."""
        return [bool(w) for w in self._processes.summed(torch.tensor(wishes, dtype=torch.float32)).tolist()]

    def _lost(self) -> str:
        """The sentence about a process that is gone."""
        where = f"a process of the training was lost in step {len(self.history) + 1} of {self.run.num_steps}"
        if self.directory is None or not self.saved:
            return f"{where}; no state was saved yet, so the same command starts again"
        return (
            f"{where}; the state after step {self.saved} is saved in {self.directory.path}, and the same command goes "
            "on from there, on any number of processes"
        )


def _release(decoder: Decoder) -> None:
    """Back to a model that is used, not trained."""
    decoder.eval().requires_grad_(False)
    decoder.gradient_checkpointing = False
    decoder.zero_grad(set_to_none=True)
