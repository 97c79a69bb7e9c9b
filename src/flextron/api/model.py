"""What `convert` and `load` give: a model to train, profile, ask for sub-networks and cut into dense ones."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from flextron.api.texts import Texts, documents, evaluation_text, needed, source_name, training_text, windows
from flextron.elastic import ElasticInfo, extract, write_elastic
from flextron.errors import FlextronError
from flextron.evals import Perplexity, evaluate_perplexity
from flextron.files import new_directory, write_json
from flextron.model.checkpoint import check_stock, load_decoder, open_pretrained, write_checkpoint
from flextron.model.cost import num_parameters
from flextron.model.decoder import Decoder
from flextron.model.generation import SamplingParams, generate
from flextron.routing import (
    Frontier,
    FrontierPoint,
    LatencyTable,
    SearchSettings,
    device_fingerprint,
    measure_table,
    search_frontier,
)
from flextron.spec import SearchSpace, SubnetSpec, Target
from flextron.training.blocks import TokenBlocks, pack_tokens
from flextron.training.recipe import TrainRecipe
from flextron.training.trainer import OnStep, TrainResult, train

__all__ = ["DenseModel", "ElasticModel"]

OnProgress = Callable[[int, int], None]


class _Generates:
    """What elastic and dense models share: text in, text out."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None

    def _generate(self, prompts: Sequence[str], spec: SubnetSpec, params: SamplingParams) -> list[str]:
        tokenizer = needed(self.tokenizer)
        if not params.stop_token_ids and tokenizer.eos_token_id is not None:
            params = replace(params, stop_token_ids=(tokenizer.eos_token_id,))
        ids = [tokenizer.encode(p, add_special_tokens=False) for p in prompts]
        return [str(tokenizer.decode(out)) for out in generate(self.decoder, ids, spec, params)]


@dataclass(slots=True)
class DenseModel(_Generates):
    """A sub-network on its own."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    hf_config: Mapping[str, Any]

    def generate(self, prompt: str, **params: Any) -> str:
        """Continue a prompt; keywords as for `SamplingParams`."""
        return self._generate([prompt], self.decoder.widths, SamplingParams(**params))[0]

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write an ordinary Hugging Face checkpoint, which `AutoModelForCausalLM` loads.

        Raises:
            FlextronError: the layers differ in width, or the directory exists.
        """
        with new_directory(Path(directory), overwrite=overwrite) as temporary:
            write_checkpoint(self.decoder, temporary, hf_config=self.hf_config, tokenizer=self.tokenizer)


@dataclass(slots=True)
class ElasticModel(_Generates):
    """A pretrained model that holds a sub-network for every target."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    hf_config: Mapping[str, Any]
    info: ElasticInfo
    tables: dict[str, LatencyTable]
    """Latency tables by device."""
    frontier: Frontier | None = None
    """Measured sub-networks, once profiled."""

    @property
    def space(self) -> SearchSpace:
        """The sub-networks that it holds."""
        return self.info.space

    def to(self, device: torch.device | str) -> ElasticModel:
        """Move the weights."""
        self.decoder.to(device)
        return self

    def save(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write the elastic checkpoint, in one step.

        Raises:
            FlextronError: the directory exists and is not to be overwritten.
        """
        extra: dict[str, Any] = {f"latency/{name}.json": table.to_dict() for name, table in self.tables.items()}
        if self.frontier is not None:
            extra["frontier.json"] = self.frontier.to_dict()
        write_elastic(
            Path(directory),
            self.decoder,
            self.info,
            hf_config=self.hf_config,
            tokenizer=self.tokenizer,
            extra=extra,
            overwrite=overwrite,
        )

    def save_profile(self, directory: str | Path) -> None:
        """Write only what `profile` measured, into an existing elastic checkpoint."""
        path = Path(directory)
        (path / "latency").mkdir(exist_ok=True)
        for name, table in self.tables.items():
            write_json(path / "latency" / f"{name}.json", table.to_dict())
        if self.frontier is not None:
            write_json(path / "frontier.json", self.frontier.to_dict())

    def train(
        self,
        text: Texts = None,
        recipe: TrainRecipe | None = None,
        *,
        teacher: str | Path | None = None,
        run_directory: str | Path | None = None,
        on_step: OnStep | None = None,
    ) -> TrainResult:
        """Train the sub-networks against the frozen full model; a frontier from before no longer holds and is dropped.

        Args:
            text: documents, or a file, directory or `datasets` id; by default text that is on this machine.
            recipe: settings.
            teacher: another checkpoint of the same vocabulary to learn from; by default the model as it is now.
            run_directory: where states for resuming go, and the packed text.
            on_step: called after each step with steps done, steps in all, and losses.

        Raises:
            FlextronError: the text is too short, the recipe does not fit, or the run directory holds another run.
        """
        recipe = recipe or TrainRecipe()
        source = source_name(text, "docstrings on this machine")
        blocks, digest = self._training_blocks(text, recipe, None if run_directory is None else Path(run_directory))
        frozen = copy.deepcopy(self.decoder) if teacher is None else load_decoder(open_pretrained(teacher))
        ours, theirs = self.decoder.config, frozen.config
        if (ours.vocab_size, ours.hidden_size) != (theirs.vocab_size, theirs.hidden_size):
            raise FlextronError("teacher and student differ in vocabulary or hidden size; choose a model of its kind")
        result = train(
            self.decoder,
            frozen,
            self.space,
            blocks,
            recipe,
            run_directory=None if run_directory is None else Path(run_directory),
            identity={
                "text": source,
                "model": self.info.provenance.get("source"),
                "teacher": None if teacher is None else str(teacher),
                "tokens": digest,
                "start": self.info.recipe.get("num_tokens", 0),
            },
            on_step=on_step,
        )
        facts = {
            "train": recipe.model_dump(mode="json"),
            "text": source,
            "num_steps": result.num_steps,
            "num_tokens": self.info.recipe.get("num_tokens", 0) + result.num_tokens,
            "tokens_per_second": round(result.tokens_per_second, 1),
        }
        self.info = replace(self.info, recipe=facts)
        self.frontier = None  # latencies depend on widths, not on weights, and still hold
        return result

    def evaluate(
        self, specs: Mapping[str, SubnetSpec], text: Texts = None, *, num_tokens: int = 8192, context: int = 256
    ) -> dict[str, Perplexity]:
        """Perplexity of named sub-networks on windows of text; by default of the held-out text of this machine."""
        tokens_BT = windows(documents(text, evaluation_text), self.tokenizer, num_tokens=num_tokens, context=context)
        return {name: evaluate_perplexity(self.decoder, tokens_BT, spec) for name, spec in specs.items()}

    def num_parameters(self, spec: SubnetSpec | None = None) -> int:
        """Parameters of a sub-network (the full one by default), embeddings included."""
        return num_parameters(self.decoder.config, spec or self.space.full)

    def _training_blocks(self, text: Texts, recipe: TrainRecipe, run_directory: Path | None) -> tuple[TokenBlocks, str]:
        """The packed text and a name for it; kept in the run directory, so that a resumed run sees the same."""
        texts = text if text is None or isinstance(text, str) else list(text)
        wanted = repr((texts, recipe.tokens, recipe.context)).encode()
        digest = hashlib.sha256(wanted).hexdigest()[:16]
        stored = None if run_directory is None else run_directory / f"tokens-{digest}.npy"
        if stored is not None and stored.exists():
            return TokenBlocks.load(stored, seed=recipe.seed), digest
        tokens = pack_tokens(
            documents(texts, training_text), needed(self.tokenizer), num_tokens=recipe.tokens, context=recipe.context
        )
        blocks = TokenBlocks.from_tokens(tokens, context=recipe.context, seed=recipe.seed)
        if stored is not None:
            stored.parent.mkdir(parents=True, exist_ok=True)
            blocks.save(stored)
        return blocks, digest

    def profile(
        self,
        text: Texts = None,
        *,
        settings: SearchSettings | None = None,
        num_tokens: int = 2048,
        context: int = 256,
        batch_size: int = 1,
        decode_context: int = 128,
        on_measure: OnProgress | None = None,
        on_search: OnProgress | None = None,
    ) -> Frontier:
        """Measure latencies on this device, unless they were already, and search the frontier of loss over latency.

        Args:
            text: documents, or a file, directory or `datasets` id; by default prose that is on this machine.
            settings: of the search.
            num_tokens: of text on which each sub-network's loss is measured.
            context: tokens of a window of that text.
            batch_size: sequences of the decode step that is timed.
            decode_context: tokens that each of them holds.
            on_measure: called with timing rounds done and in all.
            on_search: called with sub-networks measured and to be measured.
        """
        validation_BT = windows(
            documents(text, evaluation_text), self.tokenizer, num_tokens=num_tokens + 2 * context, context=context
        )
        table = self.tables.get(device_fingerprint(self.decoder.device, self.decoder.dtype))
        if table is None or (table.batch_size, table.context) != (batch_size, decode_context):
            table = measure_table(
                self.decoder, self.space, batch_size=batch_size, context=decode_context, on_progress=on_measure
            )
        self.frontier = search_frontier(
            self.decoder,
            self.space,
            table,
            calibration_BT=validation_BT[:2],
            validation_BT=validation_BT[2:] if len(validation_BT) > 2 else validation_BT,
            text=source_name(text, "pydoc topics"),
            settings=settings,
            on_progress=on_search,
        )
        self.tables[table.device] = table
        return self.frontier

    def select(self, *, uniform: bool = False, **target: Any) -> SubnetSpec:
        """The best sub-network for a target: `latency`, `latency_ms`, `params`, `memory_gb` or `max_loss_increase`.

        Args:
            uniform: only sub-networks that are stock checkpoints when extracted.
            target: the limit, as for `Target`.

        Raises:
            FlextronError: no such target, nothing within it, or the model was not profiled on this device.
        """
        wanted = Target(**target)
        return self._profiled(wanted).select(wanted, allowed=self._is_stock if uniform else None).spec

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
        target = Target(latency=latency)
        return self._profiled(target).select(target)

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

    def generate(self, prompt: str, *, spec: SubnetSpec | None = None, **options: Any) -> str:
        """Continue a prompt.

        Args:
            prompt: text.
            spec: the sub-network; the full one by default, unless a target is among the options.
            options: a target as for `select`, or fields of `SamplingParams`.

        Raises:
            FlextronError: as for `select` and `SamplingParams`.
        """
        names = {f.name for f in fields(Target)}
        target = {k: v for k, v in options.items() if k in names}
        params = SamplingParams(**{k: v for k, v in options.items() if k not in names})
        if spec is None:
            spec = self.select(**target) if target else self.space.full
        return self._generate([prompt], spec, params)[0]

    def extract(self, spec: SubnetSpec) -> DenseModel:
        """A sub-network as a model of its own."""
        return DenseModel(extract(self.decoder, spec), self.tokenizer, self.hf_config)
