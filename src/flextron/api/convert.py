"""`convert`: from a pretrained checkpoint to an `ElasticModel`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flextron.api.model import ElasticModel
from flextron.api.packaged import TINY, checkpoint_at
from flextron.api.texts import Texts, documents, sequences, training_text
from flextron.checkpoints.fingerprint import weights_digest
from flextron.checkpoints.huggingface import open_pretrained
from flextron.checkpoints.weights import load_decoder
from flextron.elastic import ElasticInfo, permute, rank
from flextron.elastic.checkpoint import provenance
from flextron.elastic.importance import Method
from flextron.errors import FlextronError
from flextron.routing.device import default_device
from flextron.spec import SearchSpace

__all__ = ["convert"]

_RATIOS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


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
        source: hub id, local directory or `.gguf` file; or `tiny`, the small model that the package holds.
        calibration: documents, or a file, directory or `datasets` id; by default text that is on this machine.
        method: method of ranking, see `flextron.elastic.importance`.
        ratios: choices of MLP width and attention groups, as fractions of the full ones.
        multiple_of: MLP widths are multiples of this; by default 64, or less where the width asks for it.
        max_skipped_layers: how many layers a sub-network may skip; by default a third.
        num_calibration_tokens: tokens to rank on.
        context: tokens of a calibration sequence.

    Raises:
        FlextronError: the checkpoint or the choices are not usable; says why.
    """
    pretrained = open_pretrained(checkpoint_at(source))
    decoder = load_decoder(pretrained).eval().requires_grad_(False)
    config = decoder.config
    skipped = _max_skipped(config.num_hidden_layers, max_skipped_layers)
    calibration_BT = sequences(
        documents(calibration, lambda: training_text(max_chars=10 * num_calibration_tokens)),
        pretrained.tokenizer,
        num_tokens=num_calibration_tokens,
        context=min(context, config.max_position_embeddings),
        vocab_size=config.vocab_size,
    )
    decoder.to(default_device())
    importance = rank(decoder, calibration_BT, method)
    # a GGUF file has no tensors to sample, only some to compute
    digest = None if pretrained.directory is None else weights_digest(pretrained.tensors())
    name = TINY if source == TINY else pretrained.name
    permute(decoder, importance, source=name, weights=digest)
    # the first and the last layer are never idle: they read and write the vocabulary
    skippable = [i for i in importance.layers_by_importance if 0 < i < config.num_hidden_layers - 1]
    space = SearchSpace.from_ratios(
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        num_groups=config.num_groups,
        ratios=ratios,
        multiple_of=_default_multiple(config.intermediate_size) if multiple_of is None else multiple_of,
        skippable_layers=skippable[: 3 * skipped // 2],
        max_skipped_layers=skipped,
    )
    info = ElasticInfo(
        space=space,
        layer_scores=importance.layer_scores,
        provenance=provenance(name, importance=method, calibration_tokens=importance.num_tokens),
    )
    return ElasticModel(
        decoder,
        pretrained.tokenizer,
        pretrained.hf_config,
        info,
        {},
        generation_config=pretrained.generation_config,
    )


def _max_skipped(num_hidden_layers: int, wanted: int | None) -> int:
    """How many layers may be skipped at once: a third by default, never the first or the last."""
    inner = max(0, num_hidden_layers - 2)
    if wanted is None:
        return min(num_hidden_layers // 3, inner)
    if not 0 <= wanted <= inner:
        raise FlextronError(
            f"max_skipped_layers must lie between 0 and {inner}, not {wanted}: the first and the last layer always run"
        )
    return wanted


def _default_multiple(intermediate_size: int) -> int:
    """The largest of 64, 32, 16, 8, 4, 2, 1 that divides the width into at least four choices."""
    return next(
        m for m in (64, 32, 16, 8, 4, 2, 1) if (intermediate_size % m == 0 and intermediate_size // m >= 4) or m == 1
    )
