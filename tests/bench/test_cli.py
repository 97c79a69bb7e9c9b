"""`flextron bench serve`: tables, JSON, refusals, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from flextron.cli.main import main
from tests.bench.serving import Exchange, answering, serving


def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> tuple[int, str, str]:
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["flextron", "bench", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capfd.readouterr()


def test_figures_as_table_and_as_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output, html = tmp_path / "figures.json", tmp_path / "figures.html"
    with serving(answering(first_s=0.05, gap_s=0.01)) as served:
        options = ["serve", "--url", served.url, "--model", "m", "--num-requests", 6, "--rate", 50]
        options += ["--prompt-tokens", "4-8", "--output-tokens", 4, "--target", "1.0, 0.6", "--seed", 5]
        options += ["--slo-ttft-ms", 20_000, "--slo-tpot-ms", 20_000, "--output", output, "--html", html]
        code, out, err = run(capfd, monkeypatch, *options)
        assert code == 0
        for part in (
            "TTFT ms",
            "TPOT ms",
            "ITL ms",
            "E2E ms",
            "sent late ms",
            "p99",
            "Poisson, 50/s",
            "by target",
            "0.6",
        ):
            assert part in out
        assert "6 of 6" in err
        written = json.loads(output.read_text())
        assert len(written["requests"]) == 6
        assert (
            json.loads(re.findall(r'<script type="application/json" id="data">(.*)</script>', html.read_text())[0])
            == written
        )
        assert (written["summary"]["attainment"], written["summary"]["num_ok"]) == (1.0, 6)
        assert sum(part["num_requests"] for part in written["by_target"].values()) == 6
        code, out, err = run(capfd, monkeypatch, *options, "--json")
    printed = json.loads(out)
    assert code == 0
    assert "requests" not in printed
    assert printed["load"] == written["load"]
    # the same seed, the same load
    assert printed["arrivals"] == written["arrivals"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--endpoint", "embeddings"), "no endpoint"),
        (("--target", "2"), "target"),
        (("--prompt-tokens", "many"), "lengths"),
        (("--concurrency", 0), "concurrency"),
        (("--rate", -1), "rate"),
        (("--trace", "none.csv"), "does not exist"),
        (("--warmup", -1), "warm-up"),
        (("--shared-prefix", -1), "shared prefix"),
        (("--num-requests", 0), "number of requests"),
        (("--slo-ttft-ms", 0), "TTFT"),
        (("--timeout", 0), "timeout"),
        (("--max-total-tokens", 1), "total"),
        (("--output", "none/x.json"), "not a directory"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_impossible_options_are_refused_in_one_sentence(
    options: tuple[object, ...], reason: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capfd, monkeypatch, "serve", "--model", "m", "--warmup", 0, *options)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert reason in last
    assert "Traceback" not in err


def test_help_and_a_wrong_flag(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = run(capfd, monkeypatch, "--help")
    assert code == 0
    assert "serve" in out
    code, out, _ = run(capfd, monkeypatch, "serve", "--help")
    assert code == 0
    for flag in ("--url", "--rate", "--trace", "--rescale", "--slo-ttft-ms", "--shared-prefix", "--tokenizer"):
        assert flag in out
    code, _, err = run(capfd, monkeypatch, "serve", "--model", "m", "--rates", 3)
    assert code == 2
    assert "--rates" in err


def test_without_httpx_the_extra_is_named(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    code, _, err = run(capfd, monkeypatch, "serve", "--model", "m")
    assert code == 2
    assert "install flextron[bench]" in err


def test_ctrl_c_reports_what_was_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests are answered at once; with the fourth, which never is, the interrupt comes."""
    output = tmp_path / "figures.json"

    async def behaviour(exchange: Exchange) -> None:
        if exchange.number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        await answering(first_s=60 if exchange.number >= 3 else 0)(exchange)

    before = signal.getsignal(signal.SIGINT)
    with serving(behaviour) as served:
        options = ["serve", "--url", served.url, "--model", "m", "--num-requests", 9, "--warmup", 0]
        code, out, err = run(capfd, monkeypatch, *options, "--output", output, "--json")
    assert code == 130, err
    printed = json.loads(out)
    assert (printed["interrupted"], printed["num_unfinished"], printed["summary"]["num_ok"]) == (True, 6, 3)
    assert len(json.loads(output.read_text())["requests"]) == 3
    assert signal.getsignal(signal.SIGINT) is before
