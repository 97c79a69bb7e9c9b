"""Examples of a job going through the model, packed side by side, unit by unit (`finetuning/layerwise.py`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from flextron.finetuning.example import Example
from flextron.finetuning.layerwise import Finetuning
from flextron.model.adapter import Adapter
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["Pass", "epoch_order", "packs"]


class Pass:
    """One pass over some examples, pack by pack: it gives their mean loss and, unless left out, its gradients."""

    def __init__(
        self,
        decoder: Decoder,
        adapter: Adapter,
        examples: Sequence[Example],
        pack_tokens: int,
        *,
        spec: SubnetSpec,
        kept: Callable[[int], Collection[str]] = lambda num_tokens: (),
        backward: bool = True,
    ) -> None:
        """Lay out the first pack; computes nothing yet.

        Args:
            decoder: frozen.
            adapter: must not change before the last unit.
            examples: at least one.
            pack_tokens: tokens of examples that are run side by side, unless a single one has more.
            spec: sub-network to run in.
            kept: linears whose products are kept for a pack of so many tokens.
            backward: whether gradients are added to the adapter's parameters.

        Raises:
            FlextronError: as for `Finetuning`.
        """
        self.loss = 0.0
        """Sum of what the packs so far add to the mean over the trained tokens, in nats."""
        self.num_tokens = 0
        """Tokens that went through."""
        self._num_right = self._num_weighted = 0
        self._name = "" if backward else "validation "
        total = float(sum(sum(e.mask) for e in examples))

        def made() -> Iterator[Finetuning]:
            for pack in packs(examples, pack_tokens):
                keep = kept(sum(len(e.tokens) for e in pack)) if backward else ()
                yield Finetuning(decoder, adapter, pack, spec=spec, total_weight=total, keep=keep, backward=backward)

        # one at a time: all examples of a large file side by side would fill the memory
        self._packs = made()
        self._work = next(self._packs, None)

    @property
    def unit(self) -> str | None:
        """Kind of the next unit; None once all is done."""
        if self._work is None:
            return None
        assert self._work.stage is not None
        return self._name + self._work.stage.value

    @property
    def num_left(self) -> int:
        """Tokens that the next unit has at most."""
        return 0 if self._work is None else self._work.num_left_of_layer

    @property
    def accuracy(self) -> float:
        """Share of the trained tokens so far that were the likeliest."""
        return self._num_right / max(1, self._num_weighted)

    def run(self, num_tokens: int) -> None:
        """Run the next unit, with at most so many tokens."""
        assert self._work is not None
        self._work.run(num_tokens)
        if self._work.stage is None:
            self.loss += self._work.loss
            self._num_right += self._work.num_right
            self._num_weighted += self._work.num_weighted
            self.num_tokens += self._work.num_tokens
            self._work = next(self._packs, None)


def epoch_order(num_examples: int, epoch: int, seed: int) -> list[int]:
    """The order in which an epoch of a job passes over its examples."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(num_examples, generator=generator).tolist()


def packs(examples: Sequence[Example], num_tokens: int) -> Iterator[list[Example]]:
    """Deal examples into packs: side by side up to so many tokens, in their order; a longer one is alone."""
    pack: list[Example] = []
    size = 0
    for example in examples:
        own = len(example.tokens) - 1
        if pack and size + own > num_tokens:
            yield pack
            pack, size = [], 0
        pack.append(example)
        size += own
    yield pack
