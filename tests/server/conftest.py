"""One model and one server for the tests that leave them as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
