"""What a service can be given, and asked, while it runs: jobs, and whether its engine works."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx

from flextron import ElasticModel
from flextron.jobs.records import Status
from tests.finetuning.bigram import BigramMaker
from tests.jobs.making import new_jobs, upload
from tests.server.running import Running, running, wait_until

ASKED: dict[str, Any] = {"model": "tiny", "prompt": "The cat", "max_tokens": 100, "ignore_eos": True}


def _ask(server: Running, count: int = 1) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=ASKED | {"n": count}, timeout=60)


def test_jobs_that_come_later_train_beside_requests(model: ElasticModel, tmp_path: Path) -> None:
    jobs = new_jobs(tmp_path / "state", BigramMaker(0.0))
    try:
        with running(model) as server:
            service = server.service
            before = _ask(server).json()["choices"]
            asking = threading.Thread(target=_ask, args=(server, 8))
            asking.start()
            wait_until(lambda: service.worker.load.num_running > 0)
            assert service._loop is not None
            service._loop.call_soon_threadsafe(service.attach, jobs)
            job = jobs.create(training_file=upload(jobs))
            wait_until(lambda: jobs.repository.get(job.id).status is Status.SUCCEEDED)
            asking.join(20)
            assert _ask(server).json()["choices"][0]["finish_reason"] == before[0]["finish_reason"]
            assert service._driver is not None
            assert service._driver.num_tokens > 0
    finally:
        jobs.close()


def test_progress_grows_while_there_is_work_and_stands_where_it_hangs(model: ElasticModel) -> None:
    with running(model) as server:
        service, core = server.service, server.service.core
        wait_until(lambda: service.progress is None)
        hang, step = threading.Event(), core.step
        seen: list[int | None] = []

        def watched() -> Any:
            seen.append(service.progress)
            if len(seen) == 20:
                hang.wait(30)
            return step()

        core.step = watched  # type: ignore[method-assign]
        asking = threading.Thread(target=_ask, args=(server,))
        asking.start()
        wait_until(lambda: len(seen) == 20)
        numbers = [number for number in seen if number is not None]
        assert numbers == sorted(set(numbers))
        assert len(numbers) == 20
        assert {service.progress for _ in range(100)} == {seen[-1]}
        hang.set()
        asking.join(30)
        wait_until(lambda: service.progress is None)
