"""One model and one server for the tests that leave them as they were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from flextron import ElasticModel
from tests.server.running import Running, running, running_chat
from tests.trained import trained_model

TEMPLATE = (
    "{% for m in messages %}{% if m.role in ('tool', 'function') %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)


@pytest.fixture(scope="session")
def model() -> ElasticModel:
    """Without a chat template."""
    return trained_model()


@pytest.fixture(scope="session")
def server(model: ElasticModel) -> Iterator[Running]:
    """Lets everyone in."""
    with running(model) as made:
        yield made


@pytest.fixture(scope="session")
def chat_server() -> Iterator[Running]:
    """Of a model with a chat template."""
    with running_chat(TEMPLATE) as made:
        yield made


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """It keeps its clients; one that is collected in a later test would leave that one an open socket."""
    # else the import asks the network for prices
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    module = pytest.importorskip("litellm")
    yield module
    for client in module.in_memory_llm_clients_cache.cache_dict.values():
        if isinstance(client, OpenAI):
            client.close()
    module.in_memory_llm_clients_cache.flush_cache()
