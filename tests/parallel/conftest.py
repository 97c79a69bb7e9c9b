"""Two processes of one group, for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import Ranks

needs_gpus = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="session", params=["gloo", pytest.param("cpu:gloo,cuda:nccl", marks=needs_gpus)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    workers = Ranks(request.param, 2, tmp_path_factory.mktemp("ranks"))
    yield workers
    workers.close()
