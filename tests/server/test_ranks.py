"""`flextron serve --tensor-parallel 2` as users run it: a command, its other rank, clients, and what ends it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from typer.testing import CliRunner

from flextron.checkpoints.peft.writing import write_adapter
from flextron.cli.main import app
from tests.model.adapter_cases import random_ia3, random_lora
from tests.trained import trained_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks are to share the processor"),
]
_ASKED: dict[str, Any] = {"prompt": "The cat", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a frontier, and two adapters of it."""
    directory = tmp_path_factory.mktemp("ranks")
    model = trained_model()
    model.save(directory / "model")
    write_adapter(random_lora(model.decoder.config, 3), directory / "lora")
    write_adapter(random_ia3(model.decoder.config, 1), directory / "ia3")
    return directory


@contextmanager
def serving(checkpoint: Path, *options: str, launcher: Sequence[str] = ()) -> Iterator[tuple[httpx.Client, Any]]:
    """The command, once it serves; killed at the end, if it still runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, *launcher, "-m", "flextron", "serve", str(checkpoint / "model"), "--name", "m"]
    command += ["--port", str(port), "--kv-cache-gb", "0.01", *options]
    for name in ("lora", "ia3"):
        command += ["--adapter", f"{name}={checkpoint / name}"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            end = time.monotonic() + 200
            while True:
                try:
                    client.get("/v1/models")
                    break
                except httpx.ConnectError:
                    assert process.poll() is None, process.stderr and process.stderr.read()
                    assert time.monotonic() < end
                    time.sleep(0.1)
            yield client, process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            child.kill()
        process.kill()
        process.communicate()


def questions() -> list[dict[str, Any]]:
    """All adapters, and sub-networks of all sizes."""
    points = trained_model().frontier
    assert points is not None
    sizes = sorted({p.params for p in points.points})
    limits: list[dict[str, Any]] = [{"params": sizes[0]}, {"params": sizes[len(sizes) // 2]}, {"latency": 0.8}]
    targets = [{}, *({"flextron": limit} for limit in limits)]
    return [{**_ASKED, "model": name, **target} for name in ("m", "lora", "ia3") for target in targets]


def answers(client: httpx.Client) -> list[str]:
    found: dict[int, str] = {}

    def ask(i: int, body: dict[str, Any]) -> None:
        response = client.post("/v1/completions", json=body)
        found[i] = response.json()["choices"][0]["text"] if response.status_code == 200 else response.text

    threads = [threading.Thread(target=ask, args=(i, body)) for i, body in enumerate(questions())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(len(threads))]


def companions(process: Any) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "flextron.engine.companion" in child.cmdline()]


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> list[str]:
    with serving(checkpoint) as (client, _):
        return answers(client)


def end(process: Any, others: list[psutil.Process], code: int) -> str:
    """What the command said, once it has ended in time and with it all others."""
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    _, alive = psutil.wait_procs(others, 5)
    assert not alive
    assert "Traceback" not in said
    return str(said)


@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")])
def test_answers_are_those_of_one_rank_and_a_signal_ends_all(
    checkpoint: Path, wanted: list[str], launcher: Sequence[str]
) -> None:
    assert len(set(wanted)) > 3
    with serving(checkpoint, "--tensor-parallel", "2", launcher=launcher) as (client, process):
        assert answers(client) == wanted
        measured = client.post("/page/measure", json={})
        assert measured.status_code in (400, 404)
        others = psutil.Process(process.pid).children(recursive=True)
        assert others
        process.send_signal(signal.SIGTERM)
        if launcher:  # which tells of the signal in a traceback of its own
            process.wait(60)
            assert not psutil.wait_procs(others, 5)[1]
        else:
            end(process, others, 0)


def test_ctrl_c_lets_running_answers_end(checkpoint: Path) -> None:
    """The terminal sends it to all processes."""
    with serving(checkpoint, "--tensor-parallel", "2") as (client, process):
        others = companions(process)
        with client.stream(
            "POST", "/v1/completions", json={**_ASKED, "model": "m", "max_tokens": 30, "stream": True}
        ) as response:
            lines = response.iter_lines()
            next(lines)
            for each in (process, *others):
                each.send_signal(signal.SIGINT)
            rest = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] is not None
        end(process, others, 0)


@pytest.mark.parametrize("is_busy", [True, False])
def test_a_rank_that_dies_ends_the_server_in_seconds_with_one_sentence(checkpoint: Path, is_busy: bool) -> None:
    with serving(checkpoint, "--tensor-parallel", "2") as (client, process):
        (other,) = companions(process)
        body = {**_ASKED, "model": "m", "max_tokens": 100, "stream": True}
        if is_busy:
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                began = time.monotonic()
                other.kill()
                rest = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
            assert "the engine has stopped" in json.loads(rest[-1])["error"]["message"]
        else:
            began = time.monotonic()
            other.kill()
        said = end(process, [other], 2)
        assert time.monotonic() - began < 15
        sentence = "error: rank 1 of 2 was ended by SIGKILL, and its part of the model is gone; start again"
        assert said.splitlines()[-1] == sentence


def test_the_others_end_with_a_first_rank_that_is_killed(checkpoint: Path) -> None:
    with serving(checkpoint, "--tensor-parallel", "2") as (_, process):
        others = companions(process)
        process.kill()
        _, alive = psutil.wait_procs(others, 10)
        assert not alive


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--state-directory", "state"], "--state-directory needs the whole model in one process"),
        (["--profile"], "--profile needs the whole model in one process; leave it out and run flextron profile before"),
        (["--weights", "int8"], "several ranks run PyTorch's operators on float32 weights"),
        (["--device", "cpu"], "ranks choose their devices themselves"),
        (["--dtype", "bfloat16"], "ranks choose their devices themselves"),
    ],
)
def test_what_does_not_go_together_is_refused(options: list[str], sentence: str) -> None:
    done = CliRunner().invoke(app, ["serve", "tiny", "--tensor-parallel", "2", *options])
    assert done.exit_code == 2
    assert sentence in " ".join(done.stderr.split())
