"""Token-level finetuning: exact gradients of an adapter in units of work as small as one asks for (FlexLLM, section 6).

A unit is one layer for a chunk of tokens. Forward goes layer by layer, and within a layer from the first tokens to the
last, whose chunks append to keys and values of their own. The head follows. Backward goes layer by layer from the
last, and within a layer from the last tokens to the first: what later chunks send to earlier keys and values is summed
up, and enters the key and value projections once all later chunks have added theirs. Between units only the layers'
inputs, keys and values are kept; a unit computes the rest of its layer and chunk again. The cuts need not be the same
forward and backward.

The paper's chunks go through all layers at once, which makes a small unit read every weight for few tokens. One layer
for many tokens takes the same time at the speed of a large batch.

Shapes: T tokens of all examples that are run, N tokens of a chunk, D hidden size, K KV heads, d head size.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from flextron.errors import FlextronError
from flextron.finetuning.activations import Saved, put_rows
from flextron.finetuning.attention import ChunkAttention
from flextron.finetuning.example import Example
from flextron.finetuning.packing import Packed
from flextron.finetuning.recompute import KEEPABLE, PrunedBatch, RecordedBatch, unread_linears
from flextron.finetuning.units import Stage, Units
from flextron.kernels.elementwise import use_kernels
from flextron.losses.likelihoods import scored
from flextron.losses.vocabulary import summed_cross_entropy
from flextron.model.adapter import Adapter
from flextron.model.batch import Batch, Segment
from flextron.model.decoder import Decoder
from flextron.spec import SubnetSpec

__all__ = ["Finetuning"]


class Finetuning:
    """One forward and backward pass of an adapter over packed examples, unit by unit; or the forward pass alone.

    Call `run` until it returns 0; in between, anything else may run on the decoder. The adapter's gradients are added
    to its parameters' `grad`, as autograd would. The adapter must not change before the last unit.
    """

    def __init__(
        self,
        decoder: Decoder,
        adapter: Adapter,
        examples: Sequence[Example],
        *,
        spec: SubnetSpec | None = None,
        total_weight: float | None = None,
        keep: Collection[str] = (),
        backward: bool = True,
    ) -> None:
        """Lay out the work; computes nothing yet.

        Args:
            decoder: frozen.
            adapter: the adapter in training.
            examples: packed side by side; none sees another.
            spec: sub-network to train in; by default the decoder's full widths.
            total_weight: what the weighted sum of losses is divided by; by default the sum of these examples' weights.
                With gradient accumulation, the sum over all that one step accumulates.
            keep: what is kept instead of computed again, memory for time: products of the linears q, o, gate, up, and
                `attention`, what the heads give.
            backward: False ends the pass after the head: losses without gradients.

        Raises:
            FlextronError: `keep` names others, an example has fewer than two tokens or other than one weight a token,
                nothing has weight, a text exceeds learned positions, or the adapter is for a narrower sub-network, has
                nothing in this one, or changes the embedding or the head; or a rank would have no part of a layer.
        """
        adapter.check_inner("trained")
        self.spec = spec or decoder.widths
        _check_shared(self.spec, decoder.num_ranks)
        use_kernels(decoder)
        self._decoder, self._adapter, self._keep = decoder, adapter, frozenset(keep)
        self._backward = backward
        if not self._keep <= KEEPABLE:
            raise FlextronError(f"only {', '.join(sorted(KEEPABLE))} can be kept, not {sorted(self._keep)}")
        Segment(self.spec, (), adapter=adapter)  # refuses an adapter that does not fit
        self._packed = Packed(decoder.config, examples, total_weight, decoder.device, decoder.dtype)
        self._trained = self._trained_layers() if backward else ()
        (self._rows,) = self._packed.weights_T.nonzero(as_tuple=True)
        self._parameters = list(adapter.parameters())
        self._versions = self._adapter_versions()
        self.saved = Saved()
        self._loss = torch.zeros((), dtype=torch.float64, device=decoder.device)
        self.num_right = 0
        """Tokens with a weight that the model holds for the likeliest."""
        self._units = Units(self.spec.kept_layers, self._trained, len(self._packed), len(self._rows))

    @property
    def stage(self) -> Stage | None:
        """Stage of the next unit; None once the gradients are complete."""
        return self._units.stage

    @property
    def num_tokens(self) -> int:
        """Tokens to run: all but the last of each example, which predicts nothing."""
        return len(self._packed)

    @property
    def num_left(self) -> int:
        """Tokens of this stage whose turn is still to come, summed over its layers."""
        return self._units.num_left

    @property
    def num_left_of_layer(self) -> int:
        """Tokens of the next unit's layer whose turn is still to come."""
        return self._units.num_left_of_layer

    @property
    def num_weighted(self) -> int:
        """Tokens that predict something that has a weight."""
        return len(self._rows)

    @property
    def loss(self) -> float:
        """Weighted mean negative log-likelihood, in nats, of the tokens that went through the head."""
        return float(self._loss)

    def run(self, num_tokens: int) -> int:
        """Run the next unit: one layer, or the head, and its next tokens, as many as are left up to `num_tokens`.

        Args:
            num_tokens: at least 1.

        Returns:
            How many tokens the unit had; 0 once the gradients are complete.

        Raises:
            FlextronError: the adapter has changed since the first unit.
        """
        if self.stage is None:
            return 0
        if self._adapter_versions() != self._versions:
            raise FlextronError("the adapter has changed in the middle of a pass; step only when the pass is done")
        stage, (start, stop) = self.stage, self._units.next(num_tokens)
        if stage is Stage.FORWARD:
            self._run_forward(self._units.layer, start, stop)
        elif stage is Stage.BACKWARD:
            self._run_backward(self._units.layer, start, stop)
        else:
            self._run_head(self._rows[start:stop])
        if self._units.complete(stop - start) and self.stage is not stage:
            self._end(stage)
        return stop - start

    def _end(self, stage: Stage) -> None:
        """Leave what the next stage reads, once one is complete."""
        stream_TD = self.saved.stream
        assert stream_TD is not None
        if self.stage is None:
            self.saved.stream = None
        elif stage is Stage.HEAD:
            stream_TD[self._packed.weights_T == 0] = 0

    @torch.no_grad()
    def _run_forward(self, i: int, start: int, stop: int) -> None:
        saved = self.saved
        kept: dict[tuple[int, str], Tensor] = {}
        batch = self._batch(start, stop)
        batch = RecordedBatch(batch.tokens_N, batch.positions_N, batch.segments, self._keep, kept)
        if i == self.spec.kept_layers[0]:
            x_ND = self._decoder.embed(batch)
            if i in self._trained:
                put_rows(saved.inputs, i, x_ND, start, self.num_tokens)
        else:
            where = saved.inputs.get(i, saved.stream)
            assert where is not None
            x_ND = where[start:stop]
        attention = ChunkAttention(self._decoder.config, i, saved.past_kv(i, self._packed.seen(i, start), x_ND))
        x_ND = self._decoder.layers[i](x_ND, batch, i, self._packed.rope(i, start, stop), attention)
        self._keep_rows(i, start, attention, kept)
        self._pass_up(x_ND, start)
        if stop == self.num_tokens and i not in self._trained:
            saved.forget(i)

    def _keep_rows(self, i: int, start: int, attention: ChunkAttention, kept: dict[tuple[int, str], Tensor]) -> None:
        """Keep what a chunk of a layer made for later chunks and for the way back."""
        saved = self.saved
        made: list[tuple[dict[Any, Tensor], Any, Tensor]] = []
        if attention.new is not None:
            made += [(saved.keys, i, attention.new[0]), (saved.values, i, attention.new[1])]
        if i in self._trained:
            made += [(saved.products, key, rows) for key, rows in kept.items()]
            if attention.cached_out is not None and "attention" in self._keep:
                made += [(saved.heads, i, attention.cached_out[0]), (saved.lse, i, attention.cached_out[1])]
        for where, key, rows in made:
            put_rows(where, key, rows, start, self.num_tokens)

    def _pass_up(self, x_ND: Tensor, start: int) -> None:
        """Put a chunk of a layer's outputs where the next layer, or the head, finds them."""
        saved = self.saved
        above = self._units.layer_after
        if above in self._trained:
            put_rows(saved.inputs, above, x_ND, start, self.num_tokens)
            if start + len(x_ND) == self.num_tokens:
                saved.stream = None
            return
        if saved.stream is None:
            saved.stream = x_ND.new_empty(self.num_tokens, x_ND.shape[1])
        saved.stream[start : start + len(x_ND)] = x_ND

    @torch.no_grad()
    def _run_head(self, rows: Tensor) -> None:
        """Add losses; turn the last layer's outputs into gradients, if a backward pass follows."""
        stream_TD, packed = self.saved.stream, self._packed
        assert stream_TD is not None
        head, cap = self._decoder.head_weight.detach(), self._decoder.config.logits_cap
        if not self._backward:
            hidden = self._decoder.final_norm(stream_TD[rows])
            total, right = scored(hidden, head, packed.targets_T[rows], packed.weights_T[rows], cap)
            self._loss += total
            self.num_right += right
            return
        with torch.enable_grad():
            x = stream_TD[rows].requires_grad_()
            hidden = self._decoder.final_norm(x)
        loss = summed_cross_entropy(hidden.detach(), head, packed.targets_T[rows], packed.weights_T[rows], cap)
        self._loss += loss.total
        self.num_right += loss.num_right
        (stream_TD[rows],) = torch.autograd.grad(hidden, x, loss.gradient_ND)

    def _run_backward(self, i: int, start: int, stop: int) -> None:
        self._differentiate(i, start, stop)
        if start == 0:
            self.saved.forget(i)

    def _trained_layers(self) -> tuple[int, ...]:
        """Layers from the lowest that has a bypass in the sub-network; lower ones need no backward pass."""
        widths = self.spec.layers
        adapted = [i for i in self._adapter.adapted_layers if self._adapter.targets_in(i, widths[i])]
        if not adapted:
            raise FlextronError("the adapter has no bypass in this sub-network; nothing could be trained")
        return tuple(i for i in self.spec.kept_layers if i >= adapted[0])

    def _adapter_versions(self) -> list[int]:
        return [p._version for p in self._parameters]

    def _batch(self, start: int, stop: int) -> Batch:
        chunk, packed = slice(start, stop), self._packed
        segment = Segment(self.spec, packed.lengths(start, stop), adapter=self._adapter)
        return Batch(packed.tokens_T[chunk], packed.positions_T[chunk], (segment,))

    def _differentiate(self, i: int, start: int, stop: int) -> None:
        """Compute a layer again for a chunk, and carry the gradients from its outputs to its inputs."""
        saved, chunk = self.saved, slice(start, stop)
        assert saved.stream is not None
        targets = self._adapter.targets_in(i, self.spec.layers[i])
        is_lowest = i == self._trained[0]
        x_ND = saved.inputs[i][chunk].detach().requires_grad_(not is_lowest)
        past_kv, cached_kv = saved.past_kv(i, self._packed.seen(i, start), x_ND), None
        if i in saved.keys:
            # in the lowest layer, earlier keys and values matter only if something in their projections is trained
            matters = len(past_kv[0]) > 0 and (not is_lowest or not targets.isdisjoint("kv"))
            past_kv = past_kv[0].detach().requires_grad_(matters), past_kv[1].detach().requires_grad_(matters)
            cached_kv = saved.keys[i][chunk], saved.values[i][chunk]
            if saved.key_value_gradients is None:
                saved.key_value_gradients = _accumulator(saved.keys[i]), _accumulator(saved.values[i])
        cached_out = (saved.heads[i][chunk], saved.lse[i][chunk]) if i in saved.heads else None
        attention = ChunkAttention(self._decoder.config, i, past_kv, cached_kv, cached_out)
        y_ND = self._run_again(i, x_ND, start, stop, attention)

        ends = [(y_ND, saved.stream[chunk])]
        sums = saved.key_value_gradients or ()
        ends += [(t, s[chunk].to(t.dtype)) for t, s in zip(attention.new or (), sums, strict=True)]
        ends = [(t, g) for t, g in ends if t.requires_grad]
        sources = [t for t in (x_ND, *past_kv) if t.requires_grad]
        parameters: list[Tensor] = [p for t in sorted(targets) for p in self._adapter.at(i)[t].parameters()]
        gradients = list(
            torch.autograd.grad([t for t, _ in ends], sources + parameters, [g for _, g in ends], allow_unused=True)
        )
        if x_ND.requires_grad:
            saved.stream[chunk] = gradients.pop(0)
        if past_kv[0].requires_grad:
            for total in sums:
                total[self._packed.seen(i, start)] += gradients.pop(0)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    @torch.enable_grad()
    def _run_again(self, i: int, x_ND: Tensor, start: int, stop: int, attention: ChunkAttention) -> Tensor:
        """A layer's graph; the value is meaningless where `recompute` leaves products out."""
        batch = self._batch(start, stop)
        known = {t: rows[start:stop] for (layer, t), rows in self.saved.products.items() if layer == i}
        unread = unread_linears(self._decoder.config, self.spec.layers[i]) | known.keys()
        pruned = PrunedBatch(batch.tokens_N, batch.positions_N, batch.segments, unread, known)
        y_ND: Tensor = self._decoder.layers[i](x_ND, pruned, i, self._packed.rope(i, start, stop), attention)
        return y_ND


def _check_shared(spec: SubnetSpec, num_ranks: int) -> None:
    """Raise unless every rank has a part of all that a sub-network runs: gradients are summed half by half."""
    narrowest = min((w for w in (*spec.intermediate_sizes, *spec.num_groups) if w), default=num_ranks)
    if narrowest < num_ranks:
        raise FlextronError(
            f"{num_ranks} ranks cannot train in widths of {narrowest}; choose wider ones, or fewer ranks"
        )


def _accumulator(like: Tensor) -> Tensor:
    """Zeros for a sum of many terms: in float32 where the model is in less."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
