"""One training run: its parts, wherever they lie, and its optimizer step.

Several processes share a step's sequences (`training/dealing.py`) and the parameters (`parallel/sharding.py`), and
train as one would: the losses are means over all that the step reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from flextron.errors import FlextronError
from flextron.kernels.elementwise import use_kernels
from flextron.model.adapter import Adapter
from flextron.model.decoder import Decoder
from flextron.parallel.processes import Processes
from flextron.routing.sensitivity import Sensitivity, measure_sensitivity
from flextron.spec import SearchSpace, SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.dealing import Dealer, RouterSampler, Work, check_division
from flextron.training.objective import Distillation, Objective, Teacher
from flextron.training.optimizer import choose_trained, learning_rate, make_optimizer
from flextron.training.recipe import TrainRecipe
from flextron.training.sampling import SubnetSampler
from flextron.training.state import RunDirectory

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from flextron.parallel.sharding import Roles, Sharded

__all__ = ["TrainingRun"]

_SAMPLE_TOKENS = 512
"""For the teacher's sensitivities and its head's metric."""


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
        decoder.config.check_length(blocks.context)
        self.processes = Processes.join()
        check_division(recipe, self.processes.size)
        self.recipe, self.blocks, self.decoder = recipe, blocks, decoder
        self.num_steps = math.ceil(recipe.tokens / (recipe.batch_size * blocks.context))
        for model in (decoder, teacher):
            if model is not None:
                use_kernels(model)
        decoder.gradient_checkpointing = recipe.gradient_checkpointing
        self._move((decoder, teacher, adapter))
        sample = blocks.batch(0, math.ceil(_SAMPLE_TOKENS / blocks.context))
        # without its adapter the student is no model
        measured = decoder if adapter is None or teacher is None else teacher

        def measure() -> Sensitivity:
            return measure_sensitivity(measured, sample, space, seed=recipe.seed)

        kept = measure if directory is None else partial(directory.sensitivity, measure)
        sensitivity = partial(self.processes.shared, kept, Sensitivity.to_dict, Sensitivity.from_dict)
        sampler = self._sampler(space, tuple(specs), sensitivity, is_routed=routing is not None)
        frozen = None
        if teacher is not None and recipe.needs_teacher:
            frozen = Teacher(teacher, sample, self.processes.tensor_from_first)
        choose_trained(decoder, adapter, recipe)
        self.module = Distillation(Objective(decoder, recipe, adapter), frozen)
        self.sharded: Sharded[Distillation] | None = None
        if self.processes.are_several:
            self._shard()
        self.router = None if routing is None else routing.router.to(self.processes.device).requires_grad_()
        self.trained = self._named_trained()
        self.optimizer = make_optimizer(list(self._model_parameters()), recipe, self.router)
        self.dealer = Dealer(
            recipe=recipe,
            blocks=blocks,
            processes=self.processes,
            sampler=sampler,
            routing=routing,
            adapter=self.module.objective.adapter,
        )

    def _move(self, modules: Sequence[nn.Module | None]) -> None:
        """To this process's device; those of several are moved layer by layer, as they are sharded."""
        for module in modules:
            if module is not None and not self.processes.are_several:
                module.to(self.processes.device)

    def _shard(self) -> None:
        """Let a copy in shards take the module's place."""
        from flextron.parallel.sharding import Sharded  # a second of imports, which one process need not wait for

        kept = () if self.module.teacher is None else (self.module.teacher.metric_DD,)
        lowered = self.recipe.precision == "bf16"
        self.sharded = Sharded(self.module, _roles, self.processes, kept=kept, lowered=lowered)
        self.module = self.sharded.module

    def _sampler(
        self,
        space: SearchSpace,
        specs: tuple[SubnetSpec, ...],
        sensitivity: Callable[[], Sensitivity],
        *,
        is_routed: bool,
    ) -> SubnetSampler:
        """What draws the sub-networks; sensitivities are asked for only where they guide it."""
        recipe = self.recipe
        is_guided = recipe.sampling == "guided" and recipe.full_probability < 1 and not specs and not is_routed
        return SubnetSampler(
            config=self.decoder.config,
            space=space,
            sensitivity=sensitivity() if is_guided else None,
            recipe=recipe,
            num_steps=self.num_steps,
            specs=specs,
        )

    def _named_trained(self) -> dict[str, nn.Parameter]:
        """What trains, by its name in stored states."""
        objective = self.module.objective
        parts = {"decoder": objective.student, "adapter": objective.adapter, "router": self.router}
        held = {name: module for name, module in parts.items() if module is not None}
        named: dict[str, nn.Parameter] = {}
        for part, module in reversed(held.items()):
            prefix = f"{part}." if len(held) > 1 else ""
            known = {id(p) for p in named.values()}  # shards of an adapter lie in the decoder's layers
            own = {f"{prefix}{n}": p for n, p in module.named_parameters() if p.requires_grad and id(p) not in known}
            named = own | named
        return named

    def _model_parameters(self) -> Iterator[nn.Parameter]:
        """What trains, without a router."""
        return (p for name, p in self.trained.items() if self.router is None or not name.startswith("router."))

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; the mean losses of all that it reads."""
        rate = learning_rate(self.recipe, step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        sums: dict[str, Tensor] = {}
        for i, work in enumerate(self.dealer.works(step)):
            losses = self._backward(work, last=i == self.dealer.num_works - 1)
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        if self.router is not None:  # every process has it whole
            for p in self.router.parameters():
                if p.grad is not None:
                    p.grad = self.processes.summed(p.grad) / self.processes.size
        self._clip(step, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        values = self.processes.summed(torch.stack([value.float() for value in sums.values()])).tolist()
        return dict(zip(sums, values, strict=True)) | {"lr": rate}

    def _backward(self, work: Work, *, last: bool) -> dict[str, Tensor]:
        """This process's terms of the losses, whose gradients are added to the parameters'."""
        size = self.processes.size
        args = (work.tokens_BT, work.repeats, work.batch, work.rows, work.totals)
        # accelerate's own setting of the precision would hold for a whole process
        with torch.autocast(work.tokens_BT.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            losses = self.module(*args) if self.sharded is None else self.sharded.run(work.specs, *args, last=last)
        # gradients of several processes are averaged
        loss = losses["loss"] * size
        if work.routing_loss is not None:
            losses |= {"latency": work.routing_loss / size, "loss": losses["loss"] + work.routing_loss / size}
            loss = loss + work.routing_loss
        loss.backward()
        return losses

    def _clip(self, step: int, rate: float) -> None:
        """Bound the norm of the model's gradient.

        Raises:
            FlextronError: it is no number.
        """
        norm = torch.nn.utils.clip_grad_norm_(list(self._model_parameters()), self.recipe.grad_clip)
        if self.sharded is not None:
            norm = cast("DTensor", norm).full_tensor()
        if not torch.isfinite(norm):
            raise FlextronError(f"the gradient of step {step} is not finite; lower the learning rate ({rate:.1e})")

    def finish(self) -> None:
        """Give the caller's modules all their parameters back."""
        if self.sharded is not None:
            self.sharded.give_back()


def _roles(module: Distillation) -> Roles:
    """The parts of a distillation that lie in shards in different ways."""
    objective, teacher = module.objective, module.teacher
    return objective.student, None if teacher is None else teacher.decoder, objective.adapter
