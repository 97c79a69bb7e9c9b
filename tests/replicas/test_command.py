"""`flextron serve --replicas` as users run it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from flextron.cli.main import app
from tests.replicas.command import Command
from tests.replicas.serving import Clients, pids

REFUSED = [
    (["--replicas", "2", "--tensor-parallel", "2"], "each replica runs on one device"),
    (["--replicas", "2", "--profile"], "run flextron profile before"),
    (["--replicas", "3", "--max-replicas", "2"], "max_replicas is 2"),
    (["--max-replicas", "2"], "go with --replicas"),
    (["--ray-address", "head:6379"], "go with --replicas"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: " ".join(value)[:20])
def test_what_does_not_go_together(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["serve", "tiny", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    result = CliRunner().invoke(app, ["serve", "tiny", "--replicas", "2"])
    assert (result.exit_code, " ".join(result.stderr.split())) == (
        2,
        "error: replicas need Ray Serve; install it with: pip install 'flextron[ray]'",
    )


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(600)
def test_from_the_start_over_an_update_to_the_end(checkpoint: Path) -> None:
    pytest.importorskip("ray.serve")
    sizes = ["--kv-cache-gb", "0.005", "--max-num-seqs", "8", "--max-num-batched-tokens", "64"]
    command = Command(str(checkpoint / "model"), "--replicas", "2", "--name", "tiny", *sizes)
    try:
        url = command.url()
        first = pids()
        assert len(first) == 2
        with Clients(url, num_clients=2) as clients:
            clients.wait_for(10)
            command.process.send_signal(signal.SIGHUP)
            command.wait_for("all replicas are new")
            clients.wait_for(10)
        assert set(clients.counts) == {"whole"}, (clients.counts, clients.reasons[:3])
        assert not first & pids()
        body = {"model": "tiny", "prompt": "The cat", "max_tokens": 100, "ignore_eos": True, "n": 8, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            command.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert command.process.wait(60) == 0
        assert pids() == set()
    finally:
        command.process.kill()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_model_that_is_not_there() -> None:
    pytest.importorskip("ray.serve")
    command = Command("/nowhere", "--replicas", "1")
    assert command.process.wait(200) == 2
    command._reader.join(10)
    assert "the replicas do not start: /nowhere is not a directory" in " ".join("".join(command.said).split())
