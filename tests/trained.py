"""The trained tiny model of the package with a frontier, as if it had been profiled on this machine."""

from __future__ import annotations

import flextron
from flextron import ElasticModel
from flextron.model.cost import num_parameters
from flextron.routing import Frontier, FrontierPoint, device_fingerprint
from flextron.spec import SubnetSpec
from flextron.workflows.tiny import tiny_model

__all__ = ["TARGETS", "trained_model"]

TARGETS = (1.0, 0.8, 0.6, 0.5)
"""The latencies that its sub-networks have, as fractions."""


def trained_model() -> ElasticModel:
    """Losses are the recorded ones; latencies are made up."""
    model = flextron.load(tiny_model())
    points = [
        FrontierPoint(
            spec=(spec := SubnetSpec.from_dict(point["spec"])),
            kind="router",
            params=num_parameters(model.decoder.config, spec),
            mem_bytes=4 * num_parameters(model.decoder.config, spec),
            latency_ms=10 * latency,
            latency=latency,
            loss=point["loss"],
        )
        for point, latency in zip(model.info.recipe["points"], TARGETS, strict=True)
    ]
    device = device_fingerprint(model.decoder.device, model.decoder.dtype)
    model.frontier = Frontier.of(device, "recorded", points)
    return model
