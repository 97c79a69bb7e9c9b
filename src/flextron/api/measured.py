"""What can be measured of an elastic model, and which sub-network a target gets by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from flextron.api.dense import Generates
from flextron.api.texts import Texts, check_sequences, documents, evaluation_text, sequences, source_name
from flextron.elastic import ElasticInfo
from flextron.errors import FlextronError
from flextron.families.stock import check_stock
from flextron.model.cost import num_parameters
from flextron.model.decoder import Decoder
from flextron.progress import OnProgress
from flextron.routing import (
    Frontier,
    FrontierPoint,
    LatencyTable,
    SearchSettings,
    device_fingerprint,
    measure_table,
    search_frontier,
)
from flextron.routing.latency import Phase
from flextron.routing.losses import KnownLosses
from flextron.scoring.mean_loss import Perplexity, evaluate_perplexity
from flextron.spec import SearchSpace, SubnetSpec, Target

__all__ = ["MeasuredModel"]


@dataclass(slots=True)
class MeasuredModel(Generates):
    """An elastic model as far as measuring and choosing go; `ElasticModel` is the whole."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    hf_config: Mapping[str, Any]
    info: ElasticInfo
    tables: dict[str, LatencyTable]
    """Latency tables by device."""
    frontier: Frontier | None = None
    """Measured sub-networks, once profiled."""
    losses: KnownLosses | None = None
    """Losses of sub-networks, as they came with an elastic adapter; `profile` adds this device's latencies."""
    generation_config: Mapping[str, Any] | None = None
    """The checkpoint's `generation_config.json`, if it has one."""

    @property
    def space(self) -> SearchSpace:
        """The sub-networks that it holds."""
        return self.info.space

    def evaluate(
        self, specs: Mapping[str, SubnetSpec], text: Texts = None, *, num_tokens: int = 8192, context: int = 256
    ) -> dict[str, Perplexity]:
        """Perplexity of named sub-networks on sequences of text; by default of the held-out text of this machine."""
        tokens_BT = sequences(
            documents(text, evaluation_text),
            self.tokenizer,
            num_tokens=num_tokens,
            context=context,
            vocab_size=self.decoder.config.vocab_size,
        )
        return {name: evaluate_perplexity(self.decoder, tokens_BT, spec) for name, spec in specs.items()}

    def num_parameters(self, spec: SubnetSpec | None = None) -> int:
        """Parameters of a sub-network (the full one by default), embeddings included."""
        return num_parameters(self.decoder.config, spec or self.space.full)

    def profile(
        self,
        text: Texts = None,
        *,
        settings: SearchSettings | None = None,
        candidates: Sequence[SubnetSpec] = (),
        num_tokens: int = 2048,
        context: int = 256,
        batch_size: int = 1,
        decode_context: int = 128,
        on_measure: OnProgress | None = None,
        on_search: OnProgress | None = None,
    ) -> Frontier:
        """Measure latencies on this device, unless they were already, and search the frontier of loss over latency.

        Where losses came with an elastic adapter and no text is given, they are taken as they are, and nothing is
        searched.

        Args:
            text: documents, or a file, directory or `datasets` id; by default prose that is on this machine.
            settings: settings of the search.
            candidates: sub-networks to measure in any case.
            num_tokens: tokens of text on which each sub-network's loss is measured.
            context: tokens of a sequence of that text.
            batch_size: sequences of the decode step that is timed.
            decode_context: tokens that each of them holds.
            on_measure: called with timing rounds done and in all.
            on_search: called with sub-networks measured and to be measured.
        """
        if text is None and self.losses is not None:
            table = self.measure_latencies(batch_size=batch_size, context=decode_context, on_progress=on_measure)
            self.frontier = self.losses.priced(table)
            return self.frontier
        check_sequences(num_tokens, context)
        tokens_BT = sequences(
            documents(text, evaluation_text),
            self.tokenizer,
            num_tokens=2 * (num_tokens + context),
            context=context,
            vocab_size=self.decoder.config.vocab_size,
        )
        validation = slice(2, 2 + num_tokens // context) if len(tokens_BT) > 2 else slice(0, 2)
        table = self.measure_latencies(batch_size=batch_size, context=decode_context, on_progress=on_measure)
        self.frontier = search_frontier(
            self.decoder,
            self.space,
            table,
            calibration_BT=torch.cat((tokens_BT[:2], tokens_BT[validation.stop :])),
            validation_BT=tokens_BT[validation],
            text=source_name(text, "pydoc topics"),
            settings=settings,
            candidates=candidates,
            on_progress=on_search,
        )
        return self.frontier

    def profile_here(self, *, on_measure: OnProgress | None = None, on_search: OnProgress | None = None) -> None:
        """Do what targets need on this device and no more.

        The sub-networks of a frontier from another device keep their losses and get this device's latencies, in
        seconds; a search here (`profile`) may find better ones. A model without a frontier is profiled.

        Args:
            on_measure: called with timing rounds done and in all.
            on_search: called with sub-networks measured and to be measured.
        """
        if self.frontier is None:
            self.profile(on_measure=on_measure, on_search=on_search)
        elif self.frontier.device != device_fingerprint(self.decoder.device, self.decoder.dtype):
            table = self.measure_latencies(on_progress=on_measure)
            self.frontier = KnownLosses.of(self.frontier).priced(table)

    def measure_latencies(
        self,
        *,
        batch_size: int = 1,
        context: int = 128,
        phase: Phase = "decode",
        on_progress: OnProgress | None = None,
    ) -> LatencyTable:
        """The latency table of this device, measured unless it was already; the model keeps it.

        Args:
            batch_size: sequences of the step that is timed.
            context: tokens that each of them holds, or reads in a prefill.
            phase: `decode` or `prefill`.
            on_progress: called with timing rounds done and in all.
        """
        table = next((t for t in self.tables.values() if self._is_here(t) and t.phase == phase), None)
        if table is None or (table.batch_size, table.context) != (batch_size, context):
            table = measure_table(
                self.decoder, self.space, batch_size=batch_size, context=context, phase=phase, on_progress=on_progress
            )
            self.tables[table.name] = table
        return table

    @property
    def latency_warning(self) -> str | None:
        """Why latencies that were measured on this device may be wrong, in a sentence; None if there is no doubt."""
        return next((t.warning for t in self.tables.values() if self._is_here(t) and t.warning), None)

    def _is_here(self, table: LatencyTable) -> bool:
        return table.device == device_fingerprint(self.decoder.device, self.decoder.dtype)

    def select(self, *, uniform: bool = False, **target: Any) -> SubnetSpec:
        """The best sub-network for a target: `latency`, `latency_ms`, `params`, `memory_gb` or `max_loss_increase`.

        Args:
            uniform: only sub-networks that are stock checkpoints when extracted.
            target: the limit, as for `Target`.

        Raises:
            FlextronError: no such target, nothing within it, or the model was not profiled on this device.
        """
        return self.best(Target(**target), uniform=uniform).spec

    def best(self, target: Target, *, uniform: bool = False) -> FrontierPoint:
        """What was measured of the best sub-network for a target; arguments and errors as for `select`."""
        return self._profiled(target).select(target, allowed=self._is_stock if uniform else None)

    def _is_stock(self, spec: SubnetSpec) -> bool:
        """Whether the sub-network can be written as an ordinary checkpoint."""
        try:
            check_stock(self.decoder.config, spec)
        except FlextronError:
            return False
        return True

    def frontier_point(self, latency: float) -> FrontierPoint:
        """What was measured of the best sub-network within a fraction of the full model's latency.

        Raises:
            FlextronError: as for `select`.
        """
        return self.best(Target(latency=latency))

    def _profiled(self, target: Target) -> Frontier:
        if self.frontier is None:
            raise FlextronError("the model has no measured frontier yet; run model.profile() (flextron profile) first")
        here = device_fingerprint(self.decoder.device, self.decoder.dtype)
        if target.axis not in ("params", "memory_gb") and self.frontier.device != here:
            raise FlextronError(
                f"latencies were measured on {self.frontier.device}, not on this device ({here}); "
                "run model.profile() (flextron profile) here, or ask by params or memory_gb"
            )
        return self.frontier
