"""Elastic continued training: sub-networks of one set of weights, distilled from the frozen original (Flextron, 3.2).

A micro batch's sequences are dealt to several sub-networks that run in one nested pass; the teacher runs once. The loop
goes through `accelerate`, so the same code runs on a CPU, a GPU, or several.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from flextron.errors import FlextronError
from flextron.interrupts import Interrupted, held_interrupts
from flextron.kernels.elementwise import use_kernels
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch
from flextron.model.decoder import Decoder
from flextron.progress import OnStep
from flextron.routing.sensitivity import Sensitivity, measure_sensitivity
from flextron.spec import SearchSpace, SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.objective import Objective, Teacher
from flextron.training.optimizer import choose_trained, learning_rate, make_optimizer
from flextron.training.recipe import TrainRecipe
from flextron.training.sampling import SubnetSampler
from flextron.training.state import RunDirectory

__all__ = ["RoutedDraw", "RouterSampler", "TrainResult", "TrainingRun", "train"]

_SAMPLE_TOKENS = 512
"""For the teacher's sensitivities and its head's metric."""


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


class RouterSampler(Protocol):
    """Draws sub-networks with a router that trains along with the model."""

    @property
    def router(self) -> nn.Module:
        """Whose parameters are trained."""

    def draw(self, step: int, micro_step: int, count: int) -> RoutedDraw:
        """The sub-networks of one micro batch; a function of the seed, the step and the router's weights."""


@dataclass(frozen=True, kw_only=True)
class RoutedDraw:
    """Sub-networks that a router drew."""

    specs: list[SubnetSpec]
    gates: list[Tensor | None]
    """See `Segment.gates_L2`; None where the router had no part."""
    loss: Tensor
    """Added to the model's."""


class TrainingRun:
    """The state and the steps of one run."""

    def __init__(
        self,
        decoder: Decoder,
        teacher: Decoder | None,
        space: SearchSpace,
        blocks: TokenBlocks,
        recipe: TrainRecipe,
        directory: RunDirectory | None = None,
        specs: Sequence[SubnetSpec] = (),
        routing: RouterSampler | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """Prepare everything; arguments as for `train`."""
        if recipe.needs_teacher and teacher is None:
            raise FlextronError("the recipe compares with a teacher; give one, or set kl_weight and hidden_weight to 0")
        for spec in specs:
            if not spec.is_nested_in(decoder.widths):
                raise FlextronError(f"the sub-network to train ({spec.describe()}) is not nested in the model")
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(kwargs_handlers=[ddp])
        self.recipe, self.blocks = recipe, blocks
        decoder.config.check_length(blocks.context)
        world = self.accelerator.num_processes
        self.sequences = recipe.batch_size // world
        if recipe.batch_size % world or self.sequences % min(recipe.micro_batch_size, self.sequences):
            raise FlextronError(
                f"batch_size {recipe.batch_size} must divide evenly among {world} processes and then into micro "
                f"batches of {recipe.micro_batch_size}"
            )
        self.micro = min(recipe.micro_batch_size, self.sequences)
        self.num_steps = math.ceil(recipe.tokens / (recipe.batch_size * blocks.context))
        for model in (decoder, teacher):
            if model is not None:
                use_kernels(model)
        decoder.gradient_checkpointing = recipe.gradient_checkpointing
        device = self.accelerator.device
        self.decoder = decoder.to(device)
        self.routing = routing
        self.adapter = None if adapter is None else adapter.to(device)
        router = None if routing is None else routing.router.to(device).requires_grad_()
        optimizer = make_optimizer(choose_trained(decoder, adapter, recipe), recipe, router)
        named: dict[str, nn.Module | None] = {"decoder": decoder, "adapter": adapter, "router": router}
        parts = {name: module for name, module in named.items() if module is not None}
        self.trained: nn.Module = nn.ModuleDict(parts) if len(parts) > 1 else decoder
        self.objective, self.optimizer = self.accelerator.prepare(Objective(decoder, recipe, adapter), optimizer)
        sample = blocks.batch(0, math.ceil(_SAMPLE_TOKENS / blocks.context))
        self.teacher = None
        if teacher is not None and recipe.needs_teacher:
            self.teacher = Teacher(teacher.to(device), sample)
        # without its adapter the student is no model
        measured = decoder if adapter is None or teacher is None else teacher

        def measure() -> Sensitivity:
            return measure_sensitivity(measured, sample, space, seed=recipe.seed)

        self.sampler = self._sampler(
            space, tuple(specs), measure if directory is None else partial(directory.sensitivity, measure)
        )

    def _sampler(
        self, space: SearchSpace, specs: tuple[SubnetSpec, ...], sensitivity: Callable[[], Sensitivity]
    ) -> SubnetSampler:
        """What draws the sub-networks; sensitivities are asked for only where they guide it."""
        recipe = self.recipe
        is_guided = recipe.sampling == "guided" and recipe.full_probability < 1 and not specs and self.routing is None
        return SubnetSampler(
            config=self.decoder.config,
            space=space,
            sensitivity=sensitivity() if is_guided else None,
            recipe=recipe,
            num_steps=self.num_steps,
            specs=specs,
        )

    def _rows(self, step: int, micro_step: int, num_tokens: int) -> Tensor:
        """The tokens whose vocabulary losses are computed."""
        count = max(1, round(self.recipe.kl_fraction * num_tokens))
        rank = self.accelerator.process_index
        seed = hash((self.recipe.seed, step, micro_step, rank)) % 2**63
        rows = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))[:count]
        return rows.sort().values.to(self.accelerator.device)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; mean losses over its micro batches."""
        rate = learning_rate(self.recipe, step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        first = self.accelerator.process_index * self.sequences
        tokens = self.blocks.batch(step, self.recipe.batch_size)[first : first + self.sequences]
        micro_batches = tokens.to(self.accelerator.device).split(self.micro)
        sums: dict[str, Tensor] = {}
        for m, micro_BT in enumerate(micro_batches):
            count = self.recipe.subnets_per_batch
            rows_BT = micro_BT.repeat(count, 1) if self.recipe.sandwich else micro_BT
            count = min(count, len(rows_BT))
            routed = None if self.routing is None else self.routing.draw(step, m, count)
            if routed is None:
                batch = Batch.dealt(rows_BT, self.sampler.draw(step, m, count), adapter=self.adapter)
            else:
                batch = Batch.dealt(rows_BT, routed.specs, routed.gates, adapter=self.adapter)
            with self._sync(last=m == len(micro_batches) - 1):
                losses = self._losses(batch, micro_BT, self._rows(step, m, rows_BT.numel()))
                if routed is not None:
                    losses |= {"latency": routed.loss, "loss": losses["loss"] + routed.loss}
                self.accelerator.backward(losses["loss"] / len(micro_batches))
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach() / len(micro_batches)
        if self.routing is not None:  # not part of the wrapped module, so nobody else reduces them
            for p in self.routing.router.parameters():
                p.grad = None if p.grad is None else self.accelerator.reduce(p.grad, "mean")
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.recipe.grad_clip)
        if not torch.isfinite(norm):
            raise FlextronError(f"the gradient of step {step} is not finite; lower the learning rate ({rate:.1e})")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {name: float(value) for name, value in sums.items()} | {"lr": rate}

    def _losses(self, batch: Batch, micro_BT: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Teacher, then student, in the recipe's precision (accelerate's own setting holds for a whole process)."""
        lowered = self.recipe.precision == "bf16"
        with torch.autocast(micro_BT.device.type, torch.bfloat16, enabled=lowered):
            repeats = len(batch.tokens_N) // micro_BT.numel()
            taught = None if self.teacher is None else self.teacher(micro_BT, repeats)
            return self.objective(batch, taught, rows)  # type: ignore[no-any-return]

    def _sync(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients travel between processes with the last micro batch only."""
        return nullcontext() if last else self.accelerator.no_sync(self.objective)


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
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    restored = None if directory is None else directory.load(run.trained, optimizer)
    done, history = restored or (0, list[dict[str, float]]())
    keeps = directory is not None and run.accelerator.is_main_process
    decoder.train()
    started = saved = time.monotonic()
    first = done
    # several processes would stop at different steps, and wait for each other
    holds = directory is not None and run.accelerator.num_processes == 1
    with held_interrupts() if holds else nullcontext(lambda: False) as interrupted:
        for step in range(done, run.num_steps):
            losses = run.step(step)
            history.append(losses)
            now = time.monotonic()
            if on_step is not None:
                on_step(step + 1, run.num_steps, losses)
            due = now - saved > 60 * recipe.checkpoint_minutes and step + 1 < run.num_steps
            if directory is not None and keeps and (due or interrupted()):
                directory.save(step + 1, run.trained, optimizer, history)
                saved = time.monotonic()
                if interrupted():
                    raise Interrupted(step + 1, run.num_steps, directory.path)
    seconds = time.monotonic() - started
    tokens_per_step = recipe.batch_size * blocks.context
    _release(decoder)
    return TrainResult(
        num_steps=run.num_steps,
        num_tokens=run.num_steps * tokens_per_step,
        seconds=seconds,
        tokens_per_second=(run.num_steps - first) * tokens_per_step / max(seconds, 1e-9),
        history=history,
    )


def _release(decoder: Decoder) -> None:
    """Back to a model that is used, not trained."""
    decoder.eval().requires_grad_(False)
    decoder.gradient_checkpointing = False
    decoder.zero_grad(set_to_none=True)
