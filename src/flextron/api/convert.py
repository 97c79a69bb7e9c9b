"""`convert` and `load`: from a pretrained checkpoint, or an elastic one on disk, to an `ElasticModel`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from flextron.api.model import LOSSES_FILE, ROUTERS_FILE, TOKEN_ROUTER_FILE, ElasticModel
from flextron.api.packaged import TINY, checkpoint_at
from flextron.api.texts import Texts, documents, training_text, windows
from flextron.elastic import ElasticInfo, permute, rank, read_elastic
from flextron.elastic.adapter_file import is_adapter, read_adapter
from flextron.elastic.checkpoint import provenance, read_tensors
from flextron.elastic.importance import Method
from flextron.elastic.permute import permute_to
from flextron.elastic.sketch import check_sketch
from flextron.errors import FlextronError
from flextron.files import read_json
from flextron.model.checkpoint import find_directory, load_decoder, open_pretrained
from flextron.model.decoder import Decoder
from flextron.model.fingerprint import weights_digest
from flextron.routing import Frontier, LatencyTable, StaticRouter
from flextron.routing.losses import KnownLosses
from flextron.routing.token_router import TokenRouter
from flextron.spec import SearchSpace

__all__ = ["convert", "load"]

_RATIOS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def _default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
        method: of ranking, see `flextron.elastic.importance`.
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
    calibration_BT = windows(
        documents(calibration, lambda: training_text(max_chars=10 * num_calibration_tokens)),
        pretrained.tokenizer,
        num_tokens=num_calibration_tokens,
        context=min(context, config.max_position_embeddings),
        vocab_size=config.vocab_size,
    )
    decoder.to(_default_device())
    importance = rank(decoder, calibration_BT, method)
    # a GGUF file has no tensors to sample, only some to compute
    digest = None if pretrained.directory is None else weights_digest(pretrained.tensors())
    permute(decoder, importance, source=pretrained.name, weights=digest)
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
    name = TINY if source == TINY else pretrained.name
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


def load(source: str | Path, *, elastic: str | Path | None = None) -> ElasticModel:
    """Read an elastic checkpoint, or a pretrained one with an elastic adapter beside it.

    Args:
        source: directory of an elastic checkpoint, or `tiny` for the one that the package holds; with `elastic`, the
            base: hub id, local directory or `.gguf` file.
        elastic: elastic adapter for the base: directory or hub id.

    Raises:
        FlextronError: it is not one, or damaged, or the adapter is for another base.
    """
    if elastic is not None:
        return _load_adapted(source, elastic)
    path = Path(checkpoint_at(source)).expanduser()
    if not path.is_dir():
        raise FlextronError(f"{source} is no directory; give an elastic checkpoint made with convert")
    if is_adapter(path):
        return _load_adapted(read_adapter(path).base, path)
    info = read_elastic(path)
    pretrained = open_pretrained(path)
    decoder = load_decoder(pretrained).eval().requires_grad_(False).to(_default_device())
    _check_space(info, decoder, path)
    tables = {f.stem: LatencyTable.from_dict(read_json(f)) for f in sorted((path / "latency").glob("*.json"))}
    for table in tables.values():
        table.check(info.space)
    frontier, losses = path / "frontier.json", path / LOSSES_FILE
    measured = Frontier.from_dict(read_json(frontier)) if frontier.exists() else None
    if measured is not None and not all(p.spec.is_nested_in(info.space.full) for p in measured.points):
        raise FlextronError(f"{frontier} is of another model; delete it and measure again with profile")
    model = ElasticModel(
        decoder,
        pretrained.tokenizer,
        pretrained.hf_config,
        info,
        tables,
        measured,
        KnownLosses.from_dict(read_json(losses)) if losses.exists() else None,
        generation_config=pretrained.generation_config,
    )
    _load_routers(model, path)
    return model


def _check_space(info: ElasticInfo, decoder: Decoder, path: Path) -> None:
    if info.space.full != decoder.config.full_spec:
        raise FlextronError(
            f"the search space in {path / 'elastic.json'} is of another model ({info.space.full.describe()}, here "
            f"{decoder.config.full_spec.describe()}); make the checkpoint again with convert"
        )


def _load_adapted(base: str | Path, elastic: str | Path) -> ElasticModel:
    """A pretrained checkpoint, permuted, with an elastic adapter merged into its weights."""
    path = find_directory(elastic, "an elastic adapter")
    stored = read_adapter(path)
    pretrained = open_pretrained(base)
    decoder = load_decoder(pretrained).eval().requires_grad_(False)
    _check_space(stored.info, decoder, path)
    adapter = stored.build(decoder)
    if decoder.config.origin is None:
        permute_to(decoder, stored.permutation, source=stored.base)
    check_sketch(decoder, stored.base_sketch, stored.base)
    adapter.add_to(decoder)
    model = ElasticModel(
        decoder.to(_default_device()),
        pretrained.tokenizer,
        pretrained.hf_config,
        stored.info,
        {},
        losses=KnownLosses.from_dict(stored.extra[LOSSES_FILE]) if LOSSES_FILE in stored.extra else None,
        generation_config=pretrained.generation_config,
        adapter=adapter,
    )
    _load_routers(model, path)
    return model


def _load_routers(model: ElasticModel, path: Path) -> None:
    info, decoder = model.info, model.decoder
    if (path / ROUTERS_FILE).exists():
        stored = read_tensors(path / ROUTERS_FILE)
        static, token = (
            {name.removeprefix(kind): tensor for name, tensor in stored.items() if name.startswith(kind)}
            for kind in ("static.", "token.")
        )
        if static:
            model.router = StaticRouter.from_tensors(info.space, static)
        if token:
            model.token_router = TokenRouter.from_dict(read_json(path / TOKEN_ROUTER_FILE), token).to(decoder.device)
            model.token_router.check(decoder.config, info.space.full)
