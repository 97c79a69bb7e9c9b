"""The Python face: convert, load, train, profile, select, generate, extract. Each call is a few lines over the floors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron.elastic import ElasticInfo, extract, permute, rank, read_elastic, write_elastic
from flextron.elastic.checkpoint import provenance
from flextron.elastic.importance import Method
from flextron.errors import FlextronError
from flextron.files import new_directory, read_json, write_json
from flextron.model.checkpoint import load_decoder, open_pretrained, write_checkpoint
from flextron.model.decoder import Decoder
from flextron.model.generation import SamplingParams, generate
from flextron.model.scoring import mean_loss
from flextron.routing import Frontier, LatencyTable, SearchSettings, device_fingerprint, measure_table, search_frontier
from flextron.spec import SearchSpace, SubnetSpec, Target
from flextron.training.blocks import TokenBlocks, pack_tokens
from flextron.training.documents import read_documents
from flextron.training.machine_text import drop_overlaps, pydoc_topics, python_docstrings
from flextron.training.recipe import TrainRecipe
from flextron.training.trainer import OnStep, TrainResult, train

__all__ = ["DenseModel", "ElasticModel", "convert", "default_device", "evaluation_text", "load", "training_text"]

Texts = Iterable[str] | str | None
OnProgress = Callable[[int, int], None]

_RATIOS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_MACHINE_CHARS = 4_000_000


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluation_text() -> list[str]:
    """English prose on every machine with Python, never trained on by default: the language reference's topics."""
    return pydoc_topics()


def training_text(max_chars: int = _MACHINE_CHARS) -> list[str]:
    """Docstrings of the installed Python code, without any passage of `evaluation_text`."""
    return drop_overlaps(python_docstrings(max_chars=max_chars), evaluation_text())


def _documents(text: Texts, default: Callable[[], list[str]]) -> Iterable[str]:
    """Texts as given, those of a file or data set if it is a name, or the default."""
    if text is None:
        return default()
    return read_documents(text) if isinstance(text, str) else text


def _blocks(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase | None, *, num_tokens: int, context: int
) -> Tensor:
    """Packed windows of token ids, int64, (B, context)."""
    tokens = pack_tokens(documents, _needed(tokenizer), num_tokens=num_tokens, context=context)
    return torch.from_numpy(tokens.reshape(-1, context).astype("int64"))


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise FlextronError("the checkpoint has no tokenizer; put the original's tokenizer.json beside its config.json")
    return tokenizer


class _Generates:
    """What elastic and dense models share: text in, text out."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None

    def _generate(self, prompts: Sequence[str], spec: SubnetSpec, params: SamplingParams) -> list[str]:
        tokenizer = _needed(self.tokenizer)
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
        on_reconstruct: OnProgress | None = None,
    ) -> TrainResult:
        """Train the sub-networks against the frozen full model; what was profiled before no longer holds and is dropped.

        Args:
            text: documents, or a file, directory or `datasets` id; by default text that is on this machine.
            recipe: settings.
            teacher: another checkpoint of the same vocabulary to learn from; by default the model as it is now.
            run_directory: where states for resuming go, and the packed text.
            on_step: called after each step with steps done, steps in all, and losses.
            on_reconstruct: called during the closed-form start with layers done and in all.

        Raises:
            FlextronError: the text is too short, the recipe does not fit, or the run directory holds another run.
        """
        recipe = recipe or TrainRecipe()  # type: ignore[call-arg]
        source = text if isinstance(text, str) else "documents" if text is not None else "docstrings on this machine"
        blocks = self._training_blocks(text, recipe, None if run_directory is None else Path(run_directory))
        frozen = copy.deepcopy(self.decoder) if teacher is None else load_decoder(open_pretrained(teacher))
        if frozen.config.vocab_size != self.decoder.config.vocab_size:
            raise FlextronError("teacher and student differ in vocabulary; choose a teacher with the same tokenizer")
        result = train(
            self.decoder,
            frozen,
            self.space,
            blocks,
            recipe,
            run_directory=None if run_directory is None else Path(run_directory),
            identity={"text": source, "model": self.info.provenance.get("source")},
            on_step=on_step,
            on_reconstruct=on_reconstruct,
        )
        facts = {
            "train": recipe.model_dump(mode="json"),
            "text": source,
            "num_steps": result.num_steps,
            "num_tokens": result.num_tokens,
            "tokens_per_second": round(result.tokens_per_second, 1),
        }
        self.info = replace(self.info, recipe=facts)
        self.tables, self.frontier = {}, None
        return result

    def _training_blocks(self, text: Texts, recipe: TrainRecipe, run_directory: Path | None) -> TokenBlocks:
        """The packed text; kept in the run directory, so that a resumed run sees the same."""
        stored = None if run_directory is None else run_directory / "tokens.npy"
        if stored is not None and stored.exists():
            return TokenBlocks.load(stored, seed=recipe.seed)
        tokens = pack_tokens(
            _documents(text, training_text), _needed(self.tokenizer), num_tokens=recipe.tokens, context=recipe.context
        )
        blocks = TokenBlocks.from_tokens(tokens, context=recipe.context, seed=recipe.seed)
        if stored is not None:
            stored.parent.mkdir(parents=True, exist_ok=True)
            blocks.save(stored)
        return blocks

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
        """Measure latencies on this device, then search the frontier of loss over latency.

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
        windows = _blocks(
            _documents(text, evaluation_text), self.tokenizer, num_tokens=num_tokens + 2 * context, context=context
        )
        table = measure_table(
            self.decoder, self.space, batch_size=batch_size, context=decode_context, on_progress=on_measure
        )
        self.frontier = search_frontier(
            self.decoder,
            self.space,
            table,
            calibration_BT=windows[:2],
            validation_BT=windows[2:] if len(windows) > 2 else windows,
            text=text if isinstance(text, str) else "documents" if text is not None else "pydoc topics",
            settings=settings,
            on_progress=on_search,
        )
        self.tables[table.device] = table
        return self.frontier

    def select(self, *, uniform: bool = False, **target: Any) -> SubnetSpec:
        """The best sub-network for a target: one of `latency`, `latency_ms`, `params`, `max_loss_increase`.

        Args:
            uniform: only sub-networks that are stock checkpoints when extracted.
            target: the limit, as for `Target`.

        Raises:
            FlextronError: no such target, nothing within it, or the model was not profiled on this device.
        """
        return self._profiled(Target(**target)).select(Target(**target), uniform=uniform).spec

    def _profiled(self, target: Target) -> Frontier:
        if self.frontier is None:
            raise FlextronError("the model has no measured frontier yet; run model.profile() (flextron profile) first")
        here = device_fingerprint(self.decoder.device, self.decoder.dtype)
        if target.axis != "params" and self.frontier.device != here:
            raise FlextronError(
                f"latencies were measured on {self.frontier.device}, not on this device ({here}); "
                "run model.profile() (flextron profile) here, or ask by params"
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
        names = {"latency", "latency_ms", "params", "max_loss_increase"}
        target = {k: v for k, v in options.items() if k in names}
        params = SamplingParams(**{k: v for k, v in options.items() if k not in names})
        if spec is None:
            spec = self.select(**target) if target else self.space.full
        return self._generate([prompt], spec, params)[0]

    def extract(self, spec: SubnetSpec) -> DenseModel:
        """A sub-network as a model of its own."""
        return DenseModel(extract(self.decoder, spec), self.tokenizer, self.hf_config)

    def loss(
        self, text: Texts = None, *, spec: SubnetSpec | None = None, num_tokens: int = 8192, context: int = 256
    ) -> float:
        """Mean loss, in nats a token, over windows of text; by default the held-out text of this machine."""
        windows = _blocks(_documents(text, evaluation_text), self.tokenizer, num_tokens=num_tokens, context=context)
        return mean_loss(self.decoder, windows, spec or self.space.full)


def convert(
    source: str | Path,
    *,
    calibration: Texts = None,
    method: Method = "reconstruction",
    ratios: Sequence[float] = _RATIOS,
    multiple_of: int | None = None,
    max_skipped_layers: int | None = None,
    num_calibration_tokens: int = 8192,
    context: int = 256,
) -> ElasticModel:
    """Turn a pretrained checkpoint into an elastic one: rank, permute, and define its sub-networks. No training.

    Args:
        source: hub id, local directory or `.gguf` file.
        calibration: documents, or a file, directory or `datasets` id; by default text that is on this machine.
        method: of ranking, see `flextron.elastic.importance`.
        ratios: choices of MLP width and attention groups, as fractions of the full ones.
        multiple_of: MLP widths are multiples of this; by default 64, or less where the width asks for it.
        max_skipped_layers: how many layers a sub-network may skip; by default a quarter.
        num_calibration_tokens: tokens to rank on.
        context: tokens of a calibration sequence.

    Raises:
        FlextronError: the checkpoint or the choices are not usable; says why.
    """
    pretrained = open_pretrained(source)
    decoder = load_decoder(pretrained).eval().requires_grad_(False)
    config = decoder.config
    windows = _blocks(
        _documents(calibration, lambda: training_text(max_chars=10 * num_calibration_tokens)),
        pretrained.tokenizer,
        num_tokens=num_calibration_tokens,
        context=min(context, config.max_position_embeddings),
    )
    decoder.to(default_device())
    importance = rank(decoder, windows, method)
    permute(decoder, importance)
    skipped = config.num_hidden_layers // 4 if max_skipped_layers is None else max_skipped_layers
    # the first and the last layer are never idle: they read and write the vocabulary
    skippable = [i for i in importance.layers_by_importance if 0 < i < config.num_hidden_layers - 1]
    space = SearchSpace.from_ratios(
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        num_groups=config.num_groups,
        ratios=ratios,
        multiple_of=multiple_of or _default_multiple(config.intermediate_size),
        skippable_layers=skippable[: 2 * skipped],
        max_skipped_layers=min(skipped, len(skippable)),
    )
    info = ElasticInfo(
        space=space,
        layer_scores=importance.layer_scores,
        provenance=provenance(pretrained.name, importance=method, calibration_tokens=importance.num_tokens),
    )
    return ElasticModel(decoder, pretrained.tokenizer, pretrained.hf_config, info, {})


def _default_multiple(intermediate_size: int) -> int:
    """The largest of 64, 32, 16, 8, 4, 2, 1 that divides the width into at least four choices."""
    return next(
        m for m in (64, 32, 16, 8, 4, 2, 1) if (intermediate_size % m == 0 and intermediate_size // m >= 4) or m == 1
    )


def load(directory: str | Path) -> ElasticModel:
    """Read an elastic checkpoint.

    Raises:
        FlextronError: it is not one, or damaged.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise FlextronError(f"{directory} is no directory; give an elastic checkpoint made with convert")
    info = read_elastic(path)
    pretrained = open_pretrained(path)
    decoder = load_decoder(pretrained).eval().requires_grad_(False).to(default_device())
    tables = {f.stem: LatencyTable.from_dict(read_json(f)) for f in sorted((path / "latency").glob("*.json"))}
    frontier = path / "frontier.json"
    measured = Frontier.from_dict(read_json(frontier)) if frontier.exists() else None
    return ElasticModel(decoder, pretrained.tokenizer, pretrained.hf_config, info, tables, measured)
