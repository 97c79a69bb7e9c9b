"""What the page tells of the model: its measured sub-networks, the device, and how it is served."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from flextron.api import ElasticModel
from flextron.jobs.jobs import Jobs
from flextron.routing import device_fingerprint
from flextron.server.page.frontier import frontier_facts
from flextron.server.startup import missing_measurements
from flextron.serving.service import Service

__all__ = ["facts"]

_NOT_TOLD = ("api_key", "name", "page")


def facts(model: ElasticModel, service: Service, jobs: Jobs | None) -> dict[str, Any]:
    """All that does not change while the server runs, as JSON."""
    device = device_fingerprint(model.decoder.device, model.decoder.dtype)
    missing = missing_measurements(model)
    settings, engine = asdict(service.settings), asdict(service.core.settings)
    return {
        "name": service.catalog.name,
        "version": version("flextron"),
        "source": str(model.info.provenance.get("source", "")),
        "family": model.decoder.config.family,
        "positions": model.decoder.config.max_position_embeddings,
        "has_chat": bool(service.tokenizer.chat_template),
        "has_key": service.settings.api_key is not None,
        "full": {"spec": model.space.full.to_dict(), "params": model.num_parameters()},
        "smallest": model.num_parameters(model.space.smallest),
        "log10_size": model.space.log10_size,
        "frontier": None if model.frontier is None else frontier_facts(model.frontier),
        "has_latency": not missing,
        "token_targets": [] if model.token_router is None else sorted(model.token_router.prices),
        "device": device,
        "tables": [table.to_dict() for table in model.tables.values()],
        "missing": missing,
        "settings": {key: value for key, value in (settings | engine).items() if key not in _NOT_TOLD},
        "finetuning": None if jobs is None else {"model": jobs.model, "max_file_mb": service.settings.max_file_mb},
    }
