"""A trainer whose adapters the model takes: they depend on seed and step alone, not on the examples."""

from __future__ import annotations

from pathlib import Path

from flextron.checkpoints.peft.writing import write_adapter
from flextron.finetuning.trainer import TrainingTask
from flextron.model.adapter import Adapter
from flextron.model.config import DecoderConfig
from tests.finetuning.bigram import Bigram, BigramMaker
from tests.model.adapter_cases import random_lora

__all__ = ["LoraMaker"]


class _Drawn(Bigram):
    """Its losses are a bigram's, its adapters are drawn at random."""

    def save_adapter(self, directory: Path) -> None:
        assert isinstance(self._maker, LoraMaker)
        write_adapter(self._maker.adapter(self._seed, self.step_number), directory, overwrite=True)


class LoraMaker(BigramMaker):
    """Makes trainers of a model's adapters."""

    def __init__(self, config: DecoderConfig, seconds: float = 0.0) -> None:
        """Every step takes so much longer."""
        super().__init__(seconds)
        self._config = config

    def adapter(self, seed: int, step: int) -> Adapter:
        """What a job with this seed has after a step."""
        return random_lora(self._config, seed=1000 * seed + step)

    def __call__(self, task: TrainingTask) -> Bigram:
        return _Drawn(task, self)
