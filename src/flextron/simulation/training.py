"""Finetuning as work for the co-serving policy: units in the real order and sizes, timed by the machine's numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from flextron.bench.lengths import Lengths
from flextron.finetuning.example import Example
from flextron.finetuning.lora import UPDATE
from flextron.finetuning.packs import epoch_order, packs
from flextron.finetuning.units import Stage, Units
from flextron.simulation.machine import TrainingTimes
from flextron.simulation.times import Clock, Jitter

__all__ = ["SimulatedTraining", "drawn_examples"]

_NUM_EXAMPLES = 4096


def drawn_examples(lengths: str, longest: int, seed: int) -> list[Example]:
    """Examples of drawn lengths, of which the second half is learnt.

    Args:
        lengths: a distribution, as for `Lengths.parse`.
        longest: most tokens of one; at least 3.
        seed: seed of the draws.

    Raises:
        FlextronError: the distribution has no such form.
    """
    draws, distribution = random.Random(f"examples {seed}"), Lengths.parse(lengths)
    sizes = [min(max(3, distribution.draw(draws)), longest) for _ in range(_NUM_EXAMPLES)]
    return [Example(range(n), [int(i >= n // 2) for i in range(n)]) for n in sizes]


class SimulatedTraining:
    """A job without end; see `flextron.engine.coserving.Work`."""

    def __init__(
        self,
        times: TrainingTimes,
        clock: Clock,
        examples: Sequence[Example],
        *,
        batch_size: int = 8,
        pack_tokens: int = 1024,
        seed: int = 0,
        on_unit: Callable[[str, int], None] = lambda kind, num_tokens: None,
    ) -> None:
        """Lay out the first step.

        Args:
            times: those of the units.
            clock: moved by units.
            examples: those of the job, passed over again and again.
            batch_size: examples of a step.
            pack_tokens: tokens that are run side by side.
            seed: the job's, which orders the examples.
            on_unit: told of each unit's kind and size.
        """
        self.num_tokens = 0.0
        """Tokens trained: half of one on each way, spread over the layers."""
        self._clock, self._examples, self._on_unit = clock, examples, on_unit
        self._batch_size, self._pack_tokens, self._seed = batch_size, pack_tokens, seed
        self._layers = range(times.num_layers)
        per_ms = 1e6
        units = {kind: getattr(times, kind) for kind in (*(s.value for s in Stage), UPDATE)}
        self._times = {k: (round(u.fixed_ms * per_ms), round(u.token_ms * per_ms)) for k, u in units.items()}
        self._jitter, self._num_units = Jitter(times.jitter, seed), 0
        self._step, self._order = 0, list[int]()
        self._packs: Iterator[Units] = iter(())
        """Packs of this step that have not begun."""
        self._units: Units | None = None
        """Units of the pack under way; None when the optimizer is to take its step."""
        self._begin()

    @property
    def unit(self) -> str:
        """Kind of the next unit."""
        return UPDATE if self._units is None or self._units.stage is None else self._units.stage.value

    @property
    def num_left(self) -> int:
        """Tokens that the next unit can have at most."""
        return 1 if self._units is None else self._units.num_left_of_layer

    def run_unit(self, num_tokens: int) -> None:
        """Let the next unit have happened, with at most so many tokens."""
        kind, size = self.unit, min(num_tokens, self.num_left)
        fixed, a_token = self._times[kind]
        self._clock.ps += (fixed + a_token * size) * self._jitter.at(self._num_units)
        self._num_units += 1
        self._on_unit(kind, size)
        if self._units is None:
            self._step += 1
            self._begin()
            return
        if kind != Stage.HEAD:
            self.num_tokens += 0.5 * size / len(self._layers)
        self._units.complete(size)
        if self._units.stage is None:
            self._units = next(self._packs, None)

    def _begin(self) -> None:
        size = self._batch_size
        epoch, index = divmod(self._step, -(-len(self._examples) // size))
        if index == 0:
            self._order = epoch_order(len(self._examples), epoch, self._seed)
        batch = [self._examples[i] for i in self._order[index * size : (index + 1) * size]]
        self._packs = (self._units_of(pack) for pack in packs(batch, self._pack_tokens))
        self._units = next(self._packs)

    def _units_of(self, pack: Sequence[Example]) -> Units:
        num_tokens = sum(len(example.tokens) - 1 for example in pack)
        num_weighted = sum(sum(weight > 0 for weight in example.mask[1:]) for example in pack)
        return Units(self._layers, self._layers, num_tokens, num_weighted)
