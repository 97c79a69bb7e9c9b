"""One Ray, and models on disk."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flextron.checkpoints.peft.writing import write_adapter
from tests.jobs.making import CHAT_TEMPLATE
from tests.model.adapter_cases import random_lora
from tests.trained import trained_model


@pytest.fixture(scope="session")
def ray_here() -> Iterator[int]:
    """Serve on this machine; the port of its own proxy."""
    pytest.importorskip("ray.serve")
    from ray import serve

    from flextron.replicas.local import ray_of_its_own

    with ray_of_its_own(3):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield port
        serve.shutdown()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model that has a frontier and a chat template, and two adapters of it."""
    directory = tmp_path_factory.mktemp("replicas")
    model = trained_model()
    assert model.tokenizer is not None
    model.tokenizer.chat_template = CHAT_TEMPLATE
    model.save(directory / "model")
    for seed, name in enumerate(("one", "two")):
        write_adapter(random_lora(model.decoder.config, 3, seed), directory / name)
    return directory
