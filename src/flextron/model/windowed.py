"""Token-level finetuning: exact gradients of an adapter in units of work as small as one asks for (FlexLLM, section 6).

Forward, a text enters in windows of tokens that append to keys and values of its own. Backward goes layer by layer from
the last, and within a layer from the last tokens to the first: what later windows send to earlier keys and values is
summed up, and enters the key and value projections once all later windows have added theirs. Between units only the
layers' inputs, keys and values are kept; a unit computes the rest of its layer and window again. The cuts need not be
the same forward and backward.

Shapes: T tokens of all examples that are run, N tokens of a window, D hidden size, K KV heads, d head size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate

import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch, Segment
from flextron.model.decoder import Decoder
from flextron.model.layers import rotary_tables
from flextron.model.losses import summed_cross_entropy
from flextron.model.recompute import PrunedBatch, WindowAttention, unread_linears
from flextron.spec import SubnetSpec

__all__ = ["Example", "Finetuning", "Saved"]


@dataclass(frozen=True, slots=True)
class Example:
    """A training text."""

    tokens: Tensor
    """Token ids, 1-D."""
    weights: Tensor
    """What the prediction of each token counts, 1-D; 0 for those of a prompt. The first token's is ignored."""


@dataclass(slots=True)
class Saved:
    """All that is kept between units, besides parameters and token ids."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Input of each layer that has gradients to compute, (T, D)."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """Of each layer, rotated, (T, K, d)."""
    values: dict[int, Tensor] = field(default_factory=dict)
    """Of each layer, (T, K, d)."""
    gradient: dict[int, Tensor] = field(default_factory=dict)
    """The loss by the output of one layer, (T, D); its rows become the input's one window after the other."""
    key_value_gradients: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The loss by the keys and values of one layer, as far as later tokens have added theirs."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is held."""
        for f in fields(self):
            for held in getattr(self, f.name).values():
                yield from held if isinstance(held, tuple) else (held,)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the tensors hold."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}.values())


class Finetuning:
    """One forward and backward pass of an adapter over packed examples, unit by unit.

    Call `forward` until it returns 0, then `backward` until it returns 0; in between, anything else may run on the
    decoder. The adapter's gradients are added to its parameters' `grad`, as autograd would. The adapter must not change
    before the last unit.
    """

    def __init__(
        self,
        decoder: Decoder,
        adapter: Adapter,
        examples: Sequence[Example],
        *,
        spec: SubnetSpec | None = None,
        total_weight: float | None = None,
    ) -> None:
        """Lay out the work; computes nothing yet.

        Args:
            decoder: frozen.
            adapter: in training.
            examples: packed side by side; none sees another.
            spec: sub-network to train in; by default the decoder's full widths.
            total_weight: what the weighted sum of losses is divided by; by default the sum of these examples' weights.
                With gradient accumulation, the sum over all that one step accumulates.

        Raises:
            FlextronError: an example has fewer than two tokens or other than one weight a token, nothing has weight, a
                text exceeds learned positions, or the adapter has nothing in the sub-network.
        """
        self.spec = spec or decoder.widths
        self._decoder, self._adapter = decoder, adapter
        for example in examples:
            if len(example.tokens) < 2 or len(example.tokens) != len(example.weights):
                raise FlextronError("an example needs at least two tokens, and one weight for each of them")
            decoder.config.check_length(len(example.tokens) - 1)
        self._lengths = tuple(len(e.tokens) - 1 for e in examples)
        self._starts = tuple(accumulate(self._lengths, initial=0))
        self._tokens_T, self._targets_T, weights_T = (
            torch.cat(parts).to(decoder.device)
            for parts in (
                [e.tokens[:-1] for e in examples],
                [e.tokens[1:] for e in examples],
                [e.weights[1:].double() for e in examples],
            )
        )
        self._positions_T = torch.cat([torch.arange(n, device=decoder.device) for n in self._lengths])
        total = float(weights_T.sum()) if total_weight is None else total_weight
        if not total > 0:
            raise FlextronError("no token of the examples has a weight; nothing could be learned from them")
        self._weights_T = weights_T / total
        self._trained = self._trained_layers()
        self._versions = self._adapter_versions()
        self.saved = Saved()
        self._loss = torch.zeros((), dtype=torch.float64, device=decoder.device)
        self.num_forwarded = 0
        """Tokens that went through all layers."""
        self._pending = list(self._trained)
        """Layers whose backward pass is not complete, the next one last."""
        self._num_left = self.num_tokens
        """Leading tokens of that layer whose turn is still to come."""

    @property
    def num_tokens(self) -> int:
        """Tokens to run: all but the last of each example, which predicts nothing."""
        return len(self._tokens_T)

    @property
    def num_left_backward(self) -> int:
        """Tokens that the backward pass has still to visit, summed over layers."""
        return (len(self._pending) - 1) * self.num_tokens + self._num_left if self._pending else 0

    @property
    def is_done(self) -> bool:
        """Whether the gradients are complete."""
        return not self._pending

    @property
    def loss(self) -> float:
        """Weighted mean negative log-likelihood, in nats, of the tokens that went forward."""
        return float(self._loss)

    @torch.no_grad()
    def forward(self, num_tokens: int) -> int:
        """Run the next tokens through all layers, as many as there are up to `num_tokens`.

        Args:
            num_tokens: at least 1.

        Returns:
            How many were run; 0 once all have been.
        """
        start = self.num_forwarded
        stop = min(start + num_tokens, self.num_tokens)
        if stop == start:
            return 0
        self._check_unchanged()
        batch = self._batch(start, stop)
        x_ND = self._decoder.embed(batch)
        rope = rotary_tables(self._decoder.config, batch.positions_N, x_ND.dtype)
        for i, layer in enumerate(self._decoder.layers):
            if i in self._trained:
                self._store(self.saved.inputs, i, start, x_ND)
            attention = WindowAttention(self._decoder.config, self._held(i, start))
            x_ND = layer(x_ND, batch, i, rope, attention)
            if attention.new is not None:
                self._store(self.saved.keys, i, start, attention.new[0])
                self._store(self.saved.values, i, start, attention.new[1])
        self._store(self.saved.gradient, 0, start, self._head(x_ND, start, stop))
        self.num_forwarded = stop
        if stop == self.num_tokens:
            for i in set(self.saved.keys) - set(self._trained):
                del self.saved.keys[i], self.saved.values[i]
        return stop - start

    def backward(self, num_tokens: int) -> int:
        """Run the next unit of the backward pass: one layer, its next tokens from the end up to `num_tokens`.

        Args:
            num_tokens: at least 1.

        Returns:
            How many tokens the unit had; 0 once the gradients are complete.

        Raises:
            FlextronError: the forward pass is not complete, or the adapter has changed since.
        """
        if self.is_done:
            return 0
        if self.num_forwarded < self.num_tokens:
            raise FlextronError("the forward pass is not complete; call forward until it returns 0")
        self._check_unchanged()
        layer, stop = self._pending[-1], self._num_left
        start = max(0, stop - num_tokens)
        self._differentiate(layer, start, stop)
        self._num_left = start
        if start == 0:
            self._finish(layer)
        return stop - start

    def _trained_layers(self) -> tuple[int, ...]:
        """Layers from the lowest that has a bypass in the sub-network."""
        batch = self._batch(0, 1)  # refuses an adapter that is narrower than the sub-network
        del batch
        widths = self.spec.layers
        adapted = [i for i in self._adapter.adapted_layers if self._adapter.targets_in(i, widths[i])]
        if not adapted:
            raise FlextronError("the adapter has no bypass in this sub-network; nothing could be trained")
        return tuple(i for i in self.spec.kept_layers if i >= adapted[0])

    def _adapter_versions(self) -> list[int]:
        return [p._version for p in self._adapter.parameters()]

    def _check_unchanged(self) -> None:
        if self._adapter_versions() != self._versions:
            raise FlextronError("the adapter has changed in the middle of a pass; step only when the pass is done")

    def _pieces(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens of each example in a window."""
        cuts = [start, *(s for s in self._starts if start < s < stop), stop]
        return tuple(b - a for a, b in zip(cuts, cuts[1:], strict=False))

    def _batch(self, start: int, stop: int) -> Batch:
        segment = Segment(self.spec, self._pieces(start, stop), adapter=self._adapter)
        return Batch(self._tokens_T[start:stop], self._positions_T[start:stop], (segment,))

    def _first_held(self, start: int) -> int:
        """The first token that the token at `start` sees."""
        begin = self._starts[bisect_right(self._starts, start) - 1]
        window = self._decoder.config.sliding_window
        return begin if window is None else max(begin, start + 1 - window)

    def _held(self, layer: int, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values that a window's first token sees before it."""
        if layer not in self.saved.keys:
            return self._loss.new_zeros(0), self._loss.new_zeros(0)
        seen = slice(self._first_held(start), start)
        return self.saved.keys[layer][seen], self.saved.values[layer][seen]

    def _store(self, where: dict[int, Tensor], key: int, start: int, rows: Tensor) -> None:
        if key not in where:
            where[key] = rows.new_empty(self.num_tokens, *rows.shape[1:])
        where[key][start : start + len(rows)] = rows

    def _head(self, x_ND: Tensor, start: int, stop: int) -> Tensor:
        """Add a window's losses; their gradient by the last layer's output. Tokens without weight skip the head."""
        (rows,) = self._weights_T[start:stop].nonzero(as_tuple=True)
        gradient_ND = torch.zeros_like(x_ND)
        if len(rows) == 0:
            return gradient_ND
        with torch.enable_grad():
            x = x_ND[rows].requires_grad_()
            hidden = self._decoder.final_norm(x)
        targets, weights = self._targets_T[start:stop][rows], self._weights_T[start:stop][rows]
        loss, by_hidden = summed_cross_entropy(hidden.detach(), self._decoder.head_weight.detach(), targets, weights)
        self._loss += loss
        (gradient_ND[rows],) = torch.autograd.grad(hidden, x, by_hidden)
        return gradient_ND

    def _differentiate(self, i: int, start: int, stop: int) -> None:
        """Compute a layer again for a window, and carry the gradients from its outputs to its inputs."""
        saved, config, window = self.saved, self._decoder.config, slice(start, stop)
        targets = self._adapter.targets_in(i, self.spec.layers[i])
        is_lowest = i == self._trained[0]
        x_ND = saved.inputs[i][window].detach().requires_grad_(not is_lowest)
        held_k, held_v = self._held(i, start)
        known = None
        if i in saved.keys:
            # in the lowest layer, earlier keys and values matter only if something in their projections is trained
            matters = len(held_k) > 0 and (not is_lowest or not targets.isdisjoint("kv"))
            held_k, held_v = (t.detach().requires_grad_(matters) for t in (held_k, held_v))
            known = saved.keys[i][window], saved.values[i][window]
            if i not in saved.key_value_gradients:
                saved.key_value_gradients[i] = _accumulator(saved.keys[i]), _accumulator(saved.values[i])
        attention = WindowAttention(config, (held_k, held_v), known)
        batch = self._batch(start, stop)
        pruned = PrunedBatch(
            batch.tokens_N, batch.positions_N, batch.segments, unread_linears(config, self.spec.layers[i])
        )
        with torch.enable_grad():
            rope = rotary_tables(config, batch.positions_N, x_ND.dtype)
            y_ND = self._decoder.layers[i](x_ND, pruned, i, rope, attention)

        outputs = [(y_ND, saved.gradient[0][window])]
        if attention.new is not None:
            sums = saved.key_value_gradients[i]
            outputs += [(t, s[window].to(t.dtype)) for t, s in zip(attention.new, sums, strict=True)]
        outputs = [(t, g) for t, g in outputs if t.requires_grad]
        parameters = [p for t in sorted(targets) for p in self._adapter.at(i)[t].parameters()]
        inputs = [t for t in (x_ND, held_k, held_v) if t.requires_grad]
        gradients = torch.autograd.grad(
            [t for t, _ in outputs], inputs + parameters, [g for _, g in outputs], allow_unused=True
        )
        into = dict(zip(map(id, inputs), gradients, strict=False))
        if x_ND.requires_grad:
            saved.gradient[0][window] = into[id(x_ND)]
        if held_k.requires_grad:
            for total, held in zip(saved.key_value_gradients[i], (held_k, held_v), strict=True):
                total[start - len(held) : start] += into[id(held)]
        for parameter, gradient in zip(parameters, gradients[len(inputs) :], strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _finish(self, layer: int) -> None:
        """Forget what the layer needed, and turn to the one below."""
        saved = self.saved
        for held in (saved.inputs, saved.keys, saved.values, saved.key_value_gradients):
            held.pop(layer, None)  # type: ignore[attr-defined]
        self._pending.pop()
        self._num_left = self.num_tokens
        if not self._pending:
            saved.gradient.clear()


def _accumulator(like: Tensor) -> Tensor:
    """Zeros for a sum of many terms: in float32 where the model is in less."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
