"""Other programs that speak OpenAI's protocol; OpenAI's own client is in all other tests."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from tests.server.running import KEY, Running, events


@pytest.mark.filterwarnings("ignore")
def test_litellm(chat_server: Running, litellm: Any) -> None:
    options: dict[str, Any] = {"api_base": f"{chat_server.url}/v1", "api_key": KEY, "temperature": 0, "max_tokens": 8}
    messages = [{"role": "user", "content": "The city was"}]
    wanted = chat_server.client().chat.completions.create(
        model="tiny@0.6",
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=8,
    )
    whole = litellm.completion(model="openai/tiny@0.6", messages=messages, **options)
    assert whole.choices[0].message.content == wanted.choices[0].message.content
    assert whole.usage.completion_tokens == 8
    stream = litellm.completion(model="openai/tiny@0.6", messages=messages, stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == wanted.choices[0].message.content
    plain = litellm.text_completion(model="text-completion-openai/tiny@0.6", prompt="In 1998", **options)
    assert plain.choices[0].text
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/other", messages=messages, **options)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(server: Running) -> None:
    body = json.dumps({"model": "tiny@0.8", "prompt": "In", "max_tokens": 3, "stream": True, "user": "me"})
    command = ["curl", "-sNi", f"{server.url}/v1/completions", "--json", body, "-H", "x-request-id: mine"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    head, _, text = out.partition("\n\n")
    assert " 200 " in head
    assert "text/event-stream" in head
    assert "x-request-id: mine" in head
    assert events(text)[-1] == "[DONE]"
