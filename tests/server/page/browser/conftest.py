"""One browser for all visits. Without playwright or chromium there are no tests here, or they say what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flextron import ElasticModel
from flextron.finetuning.lora import LoraTrainers
from tests.server.running import Running, running
from tests.server.tuning import Tuning, chat_model, tuning
from tests.trained import trained_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser

collect_ignore_glob = [] if find_spec("playwright") and find_spec("axe_playwright_python") else ["test_*.py"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from tests.server.page.browser.visit import chromium, launched

    if chromium() is None:
        pytest.skip("there is no chromium; install it with: apt-get install chromium")
    with launched() as made:
        yield made


@pytest.fixture(scope="session")
def model() -> ElasticModel:
    """With a chat template."""
    return chat_model(trained_model())


@pytest.fixture(scope="session")
def server(model: ElasticModel) -> Iterator[Running]:
    """A token takes 20 ms at least, so that there is time to press something."""
    with running(model) as made:
        made.slow_down(0.02)
        yield made


@pytest.fixture
def tuned(model: ElasticModel, tmp_path: Path) -> Iterator[Tuning]:
    """Trains LoRA adapters of the tiny model."""
    with tuning(model, tmp_path / "state", maker=LoraTrainers(model.decoder, "tiny")) as made:
        yield made
