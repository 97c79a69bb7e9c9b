"""Training an elastic model in place: what `ElasticModel.train` does."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flextron.api.measured import MeasuredModel
from flextron.api.packaged import checkpoint_at
from flextron.api.routing import shared_latencies
from flextron.api.texts import Texts, documents, needed, source_name, training_text
from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder
from flextron.elastic import ElasticInfo
from flextron.elastic.adapter import ElasticAdapter, sharing
from flextron.errors import FlextronError
from flextron.model.adapter import Adapter
from flextron.model.decoder import Decoder
from flextron.parallel.processes import LostProcessError, Processes
from flextron.progress import OnStep
from flextron.routing import StaticRouter
from flextron.spec import SubnetSpec
from flextron.texts.blocks import TokenBlocks, pack_tokens
from flextron.training.recipe import TrainRecipe
from flextron.training.router_joint import JointRouting
from flextron.training.router_recipe import RouterRecipe
from flextron.training.trainer import TrainResult, train

__all__ = ["Trained", "train_model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What training changed beside the weights, and what it did."""

    result: TrainResult
    info: ElasticInfo
    adapter: ElasticAdapter | None
    """Merged into the weights already; None if all of them were trained."""


def train_model(
    model: MeasuredModel,
    text: Texts,
    recipe: TrainRecipe,
    *,
    adapter: ElasticAdapter | None,
    router: StaticRouter | None,
    teacher: str | Path | None,
    specs: Sequence[SubnetSpec],
    with_router: bool,
    run_directory: Path | None,
    on_step: OnStep | None,
) -> Trained:
    """See `ElasticModel.train`; `adapter` and `router` are the model's."""
    if model.decoder.dtype != torch.float32:
        raise FlextronError(
            f"training changes float32 weights, and these are {model.decoder.dtype}; load the model without dtype, and "
            "let the recipe's precision be bf16"
        )
    routing = _joint_routing(model, router, recipe) if with_router else None
    source = source_name(text, "docstrings on this machine")
    blocks, digest = _training_blocks(model, text, recipe, run_directory)
    before = model.info.recipe.get("num_tokens", 0)
    identity = {
        "text": source,
        "model": model.info.provenance.get("source"),
        "teacher": None if teacher is None else str(teacher),
        "tokens": digest,
        "start": before,
        "specs": [spec.to_dict() for spec in specs],
        "with_router": with_router,
    }

    def run(student: Decoder, frozen: Decoder, updates: Adapter | None = None) -> TrainResult:
        return train(
            student,
            frozen,
            model.space,
            blocks,
            recipe,
            specs=specs,
            routing=routing,
            adapter=updates,
            run_directory=run_directory,
            identity=identity,
            on_step=on_step,
        )

    if recipe.lora_rank is None:
        result = run(model.decoder, _teacher(model, teacher))
        adapter = None  # the weights are no longer those of the base and an adapter
    else:
        result, adapter = _train_adapter(model, adapter, recipe, teacher, run)
    facts = {
        "train": recipe.model_dump(mode="json"),
        "text": source,
        "num_steps": result.num_steps,
        "num_tokens": before + result.num_tokens,
        "tokens_per_second": round(result.tokens_per_second, 1),
    }
    return Trained(result=result, info=replace(model.info, recipe=facts), adapter=adapter)


def _train_adapter(
    model: MeasuredModel,
    adapter: ElasticAdapter | None,
    recipe: TrainRecipe,
    teacher: str | Path | None,
    run: Callable[[Decoder, Decoder, Adapter | None], TrainResult],
) -> tuple[TrainResult, ElasticAdapter]:
    """Train low-rank updates beside the frozen base, then merge them; whatever happens, the model is whole again.

    Raises:
        FlextronError: the model has an adapter of another rank.
    """
    assert recipe.lora_rank is not None
    held = adapter
    if held is not None and held.rank != recipe.lora_rank:
        raise FlextronError(
            f"the model's elastic adapter has rank {held.rank}, the recipe asks for {recipe.lora_rank}; go on with its "
            "own rank, or save the model, which merges the adapter, and load it again"
        )
    if held is None:
        torch.manual_seed(recipe.seed)
        held = ElasticAdapter.fresh(model.decoder, recipe.lora_rank, recipe.lora_alpha or recipe.lora_rank)
    else:
        held = copy.deepcopy(held)
    base = model.decoder
    if adapter is not None:
        adapter.add_to(base, -1)
    try:
        # frozen weights need no more digits than the products that read them
        frozen = base if recipe.precision == "fp32" else copy.deepcopy(base).to(torch.bfloat16)
        student = sharing(frozen)
        held.set_norms(student, base)
        result = run(student, frozen if teacher is None else _teacher(model, teacher), held.lora)
        adapter = held.with_norms_of(student, base)
    except LostProcessError:
        adapter = None  # with a process, a part of the weights is gone
        raise
    finally:
        if adapter is not None:
            adapter.add_to(base)
    return result, adapter


def _teacher(model: MeasuredModel, source: str | Path | None) -> Decoder:
    """A frozen copy of the model, or another of its kind."""
    if source is None:
        return copy.deepcopy(model.decoder)
    teacher = load_decoder(open_pretrained(checkpoint_at(source)))
    ours, theirs = model.decoder.config, teacher.config
    if (ours.vocab_size, ours.hidden_size) != (theirs.vocab_size, theirs.hidden_size):
        raise FlextronError("teacher and student differ in vocabulary or hidden size; choose a model of its kind")
    return teacher


def _joint_routing(model: MeasuredModel, router: StaticRouter | None, recipe: TrainRecipe) -> JointRouting:
    """The router, with the costs of this device."""
    if router is None:
        raise FlextronError("the model has no router yet; run model.route() (flextron route) first")
    return JointRouting(
        router=router,
        table=shared_latencies(model),
        recipe=RouterRecipe(seed=recipe.seed),
        full_probability=recipe.full_probability,
    )


def _training_blocks(
    model: MeasuredModel, text: Texts, recipe: TrainRecipe, run_directory: Path | None
) -> tuple[TokenBlocks, str]:
    """The packed text and a name for it; kept in the run directory, so that a resumed run sees the same."""
    named = text is None or isinstance(text, (str, Path))
    # read once, because they are named by their content, too
    texts = text if named else list(documents(text, training_text))
    wanted = repr((texts if text is None or not named else str(text), recipe.tokens, recipe.context)).encode()
    digest = hashlib.sha256(wanted).hexdigest()[:16]
    stored = None if run_directory is None else run_directory / f"tokens-{digest}.npy"

    def pack() -> TokenBlocks:
        tokens = pack_tokens(
            documents(texts, training_text),
            needed(model.tokenizer),
            num_tokens=recipe.tokens,
            context=recipe.context,
            vocab_size=model.decoder.config.vocab_size,
        )
        return TokenBlocks.from_tokens(tokens, context=recipe.context, seed=recipe.seed)

    def store(path: Path) -> None:
        if not path.exists():
            blocks = pack()  # text that is none leaves nothing behind
            path.parent.mkdir(parents=True, exist_ok=True)
            blocks.save(path)

    if stored is None:
        return pack(), digest
    Processes.join().from_first(lambda: store(stored))
    return TokenBlocks.load(stored, seed=recipe.seed), digest
