"""`load`: from an elastic checkpoint on disk, or a pretrained one and an elastic adapter, to an `ElasticModel`."""

from __future__ import annotations

from pathlib import Path

import torch

from flextron.api.model import ElasticModel
from flextron.api.packaged import checkpoint_at
from flextron.api.stored import LOSSES_FILE, ROUTERS_FILE, TOKEN_ROUTER_FILE
from flextron.checkpoints.huggingface import find_directory, open_pretrained
from flextron.checkpoints.weights import load_decoder
from flextron.elastic import ElasticInfo, read_elastic
from flextron.elastic.adapter_file import is_adapter, read_adapter
from flextron.elastic.checkpoint import read_tensors
from flextron.elastic.permute import permute_to
from flextron.elastic.sketch import check_sketch, is_like
from flextron.errors import FlextronError
from flextron.files import read_json
from flextron.model.decoder import Decoder
from flextron.routing import Frontier, LatencyTable, StaticRouter
from flextron.routing.device import Precision, checked_device, checked_dtype
from flextron.routing.losses import KnownLosses
from flextron.routing.token_router import TokenRouter

__all__ = ["load"]


def load(
    source: str | Path,
    *,
    elastic: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: Precision = "float32",
) -> ElasticModel:
    """Read an elastic checkpoint, or a pretrained one with an elastic adapter beside it.

    Args:
        source: directory of an elastic checkpoint, or `tiny` for the one that the package holds; with `elastic`, the
            base: hub id, local directory or `.gguf` file.
        elastic: elastic adapter for the base: directory or hub id.
        device: where the weights go; by default to a GPU, if there is one.
        dtype: type of weights, activations and the KV cache. On a CPU, float32 is the fastest. Training needs it.

    Raises:
        FlextronError: it is not one, or damaged, or the adapter is for another base, or the device is not here.
    """
    where = checked_device(device), checked_dtype(dtype)
    if elastic is not None:
        return _load_adapted(source, elastic, where)
    path = Path(checkpoint_at(source)).expanduser()
    if not path.is_dir():
        raise FlextronError(f"{source} is not a directory; give an elastic checkpoint made with convert")
    if is_adapter(path):
        return _load_adapted(read_adapter(path).base, path, where)
    info = read_elastic(path)
    pretrained = open_pretrained(path)
    decoder = load_decoder(pretrained).eval().requires_grad_(False).to(*where)
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


def _load_adapted(base: str | Path, elastic: str | Path, where: tuple[torch.device, torch.dtype]) -> ElasticModel:
    """A pretrained checkpoint, permuted, with an elastic adapter merged into its weights."""
    path = find_directory(elastic, "an elastic adapter")
    stored = read_adapter(path)
    pretrained = open_pretrained(checkpoint_at(base))
    decoder = load_decoder(pretrained).eval().requires_grad_(False)
    _check_space(stored.info, decoder, path)
    adapter = stored.build(decoder)
    # the base may also be the elastic checkpoint beside which the adapter was trained, which is in order already
    if not is_like(decoder, stored.base_sketch):
        permute_to(decoder, stored.permutation, source=stored.base)
    check_sketch(decoder, stored.base_sketch, stored.base)
    adapter.add_to(decoder)
    model = ElasticModel(
        decoder.to(*where),
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
