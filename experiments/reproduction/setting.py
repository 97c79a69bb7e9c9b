"""One family and seed: its data, its base model, and the steps that all methods share (training, choosing, scoring)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from experiments.reproduction.data import Data
from experiments.reproduction.models import FamilyName, fresh_decoder, hf_config
from experiments.reproduction.scales import Scale, full_size_space, uniform_widths
from experiments.reproduction.store import Store
from flextron.cli.console import progress
from flextron.elastic import permute, rank
from flextron.elastic.importance import Method
from flextron.families.config import config_from_hf
from flextron.model.config import DecoderConfig
from flextron.model.cost import block_parameters, num_parameters
from flextron.model.decoder import Decoder
from flextron.scoring.mean_loss import mean_loss
from flextron.spec import SearchSpace, SubnetSpec
from flextron.texts.blocks import TokenBlocks
from flextron.training.recipe import TrainRecipe
from flextron.training.trainer import RouterSampler, train

__all__ = ["Setting", "Work"]


@dataclass(slots=True)
class Work:
    """What a method has spent so far."""

    FIELDS: ClassVar = ("tokens", "student_tokens", "teacher_tokens", "seconds")

    tokens: int = 0
    """Of text."""
    student_tokens: int = 0
    """Through the student, each as often as it ran in a sub-network."""
    teacher_tokens: int = 0
    """Through the frozen base, forward only."""
    seconds: float = 0.0
    """Of training."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {name: getattr(self, name) for name in self.FIELDS} | {"seconds": round(self.seconds, 2)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the methods of one family and seed have in common."""

    scale: Scale
    family: FamilyName
    seed: int
    data: Data
    store: Store
    device: torch.device

    @classmethod
    def of(cls, scale: Scale, family: FamilyName, seed: int, data: Data, output: Path) -> Setting:
        """Open the directory of a family and seed."""
        identity = {"scale": scale.to_dict(), "family": family, "seed": seed, "data": data.digest}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        store = Store(path=output / f"{family}-{seed}", identity=_as_json(identity))
        return cls(scale=scale, family=family, seed=seed, data=data, store=store, device=device)

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        """The base's `config.json`."""
        return hf_config(
            self.family,
            self.scale.shapes[self.family],
            vocab_size=len(self.data.tokenizer),
            context=self.scale.context,
            eos_token_id=self.data.tokenizer.eos_token_id,
        )

    @cached_property
    def config(self) -> DecoderConfig:
        """The base's shape."""
        return config_from_hf(self.hf_config)

    @cached_property
    def variants(self) -> dict[float, SubnetSpec]:
        """Widths of the smaller variants by size."""
        return {size: uniform_widths(self.config, size, self.scale.width_step) for size in self.scale.sizes}

    @cached_property
    def budgets(self) -> dict[float, int]:
        """Block parameters that a sub-network of a size may have: those of the variant trained end to end."""
        return {size: block_parameters(self.config, widths) for size, widths in self.variants.items()}

    @property
    def blocks(self) -> TokenBlocks:
        """Training tokens in the order of this seed, the same for every method."""
        return TokenBlocks(tokens=self.data.train.tokens, seed=self.seed)

    def space(self, *, skip: Sequence[int] = (), attention: bool = True) -> SearchSpace:
        """The base's sub-networks: multiples of the width step, numbers of groups, some layers skipped."""
        config, step = self.config, self.scale.width_step
        least = max(step, math.ceil(self.scale.narrowest_mlp * config.intermediate_size / step) * step)
        groups = max(1, math.ceil(self.scale.narrowest_attention * config.num_groups))
        return SearchSpace(
            num_hidden_layers=config.num_hidden_layers,
            intermediate_sizes=tuple(range(least, config.intermediate_size + 1, step)),
            num_groups=tuple(range(groups, config.num_groups + 1)) if attention else (config.num_groups,),
            skippable_layers=tuple(skip),
            max_skipped_layers=len(skip) // 2,
        )

    def scratch(self, widths: SubnetSpec) -> Decoder:
        """Random weights."""
        return fresh_decoder(self.hf_config, self.seed, widths)

    def base(self) -> Decoder:
        """A new copy of the pretrained base."""
        return self.store.decoder("base", self.config).to(self.device)

    def ranked_base(self, method: Method) -> tuple[Decoder, tuple[int, ...]]:
        """The permuted base, and the inner layers, the least important first."""
        decoder = self.base()
        num_windows = max(1, self.scale.num_calibration_tokens // self.scale.context)
        importance = rank(decoder, self.blocks.batch(0, num_windows), method)
        permute(decoder, importance)
        last = self.config.num_hidden_layers - 1
        return decoder, tuple(i for i in importance.layers_by_importance if 0 < i < last)

    def recipe(self, num_steps: int, *, pretraining: bool = False, **changes: Any) -> TrainRecipe:
        """A recipe of so many steps; what is alike for all methods is set here."""
        scale = self.scale
        batch_size = scale.batch_size if pretraining else scale.elastic_batch_size
        values: dict[str, Any] = {
            "tokens": num_steps * batch_size * scale.context,
            "context": scale.context,
            "batch_size": batch_size,
            "micro_batch_size": batch_size,
            "lr": (scale.lr if pretraining else scale.elastic_lr)[self.family],
            "min_lr_ratio": 0.1 if pretraining else 0.01,
            "kl_fraction": 1.0,
            "train_embeddings": True,
            "precision": scale.precision,
            "seed": self.seed,
        }
        return TrainRecipe(**values | changes)

    def train(
        self,
        name: str,
        decoder: Decoder,
        recipe: TrainRecipe,
        work: Work,
        *,
        stage: str = "train",
        teacher: Decoder | None = None,
        space: SearchSpace | None = None,
        specs: Sequence[SubnetSpec] = (),
        routing: RouterSampler | None = None,
    ) -> None:
        """Train in place, and add what it took to `work`."""
        with progress(f"{self.family}-{self.seed} {name}") as step:
            result = train(
                decoder,
                teacher,
                space or full_size_space(self.config, decoder.widths),
                self.blocks,
                recipe,
                specs=specs,
                routing=routing,
                run_directory=self.store.state(name, stage),
                identity=self.store.dependencies(name),
                on_step=step,
            )
        work.tokens += result.num_tokens
        work.student_tokens += result.num_tokens * (recipe.subnets_per_batch if recipe.sandwich else 1)
        work.teacher_tokens += result.num_tokens if recipe.needs_teacher else 0
        work.seconds += result.seconds

    def points(self, decoder: Decoder, specs: Mapping[float, SubnetSpec]) -> list[dict[str, Any]]:
        """The validation losses of sub-networks by size, and what they weigh."""
        return [
            {
                "size": size,
                "spec": spec.to_dict(),
                "params": num_parameters(self.config, spec),
                "block_params": block_parameters(self.config, spec),
                "loss": mean_loss(decoder, self.data.validation_BT, spec),
            }
            for size, spec in specs.items()
        ]


def _as_json(value: Any) -> Any:
    """Tuples as lists, as they come back from a file."""
    if isinstance(value, Mapping):
        return {key: _as_json(v) for key, v in value.items()}
    return [_as_json(v) for v in value] if isinstance(value, (list, tuple)) else value
