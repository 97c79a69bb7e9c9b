"""Clients in JavaScript, by scripts that say in one line of JSON what came back; `make test-clients` installs them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.server.clients.record import NODE, client
from tests.server.clients.schemas import City
from tests.server.running import Running

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not NODE or shutil.which("node") is None, reason="run `make test-clients`; needs node and npm"),
]
SCRIPTS = Path(__file__).parent / "node"
KINDS = ["compatible", "chat", "responses", "anthropic"]
"""The providers of the AI SDK that speak what the server speaks."""


def run(server: Running, script: str, *arguments: str) -> Any:
    """What a script prints. Modules are found from the working directory, because the script comes through stdin."""
    done = subprocess.run(
        ["node", "--input-type=module", "-", server.url, *arguments],
        input=(SCRIPTS / script).read_text(encoding="utf-8"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=NODE,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@client("openai (Node)", "chat, whole and streamed")
@client("openai (Node)", "structured output")
@client("openai (Node)", "responses, whole and streamed")
@client("openai (Node)", "embeddings")
def test_openai(tool_server: Running) -> None:
    found = run(tool_server, "openai.mjs")
    assert found["whole"] == found["streamed"] != ""
    City.model_validate(found["parsed"])
    assert found["response"] == found["response_streamed"] != ""
    vector = tool_server.client().embeddings.create(model="tiny@0.6", input="a").data[0].embedding
    assert found["embedding"] == pytest.approx(vector)


@client("AI SDK", "generateText and streamText")
@client("AI SDK", "generateObject and streamObject")
@client("AI SDK", "tools, whole and streamed")
@client("AI SDK", "tools in several steps")
@pytest.mark.parametrize("kind", KINDS)
def test_ai_sdk(tool_server: Running, kind: str) -> None:
    found = run(tool_server, "ai.mjs", kind)
    assert found["whole"]["text"] == found["streamed"]["text"] != ""
    assert found["whole"]["usage"] == found["streamed"]["usage"]
    assert found["whole"]["usage"]["outputTokens"] == 8
    assert found["whole"]["finish"] == found["streamed"]["finish"] == "length"
    City.model_validate(found["object"])
    City.model_validate(found["streamed_object"])
    for name, tool_input in [*found["calls"], *found["streamed_calls"]]:
        assert name == "city"
        City.model_validate(tool_input)
    assert len(found["calls"]) == len(found["streamed_calls"]) == 1
    assert found["steps"] == [1, 0]
    assert found["last"] != ""


@client("AI SDK", "completions and embeddings")
def test_ai_sdk_completes_and_embeds(tool_server: Running) -> None:
    found = run(tool_server, "ai_more.mjs")
    assert found["whole"] == found["streamed"] != ""
    vectors = tool_server.client().embeddings.create(model="tiny@0.6", input=["a", "b"]).data
    for wanted, given in zip(vectors, found["vectors"], strict=True):
        assert given == pytest.approx(wanted.embedding)
