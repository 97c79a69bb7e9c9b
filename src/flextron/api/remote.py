"""Finetuning by a server: the few requests that it takes, over the standard library's HTTP."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import Request, urlopen

from flextron.errors import FlextronError

__all__ = ["RemoteFinetuning", "UnreachableError"]

_ENDED = ("succeeded", "failed", "cancelled")
_PAGE = 100
_PIECE = 1 << 20


class UnreachableError(FlextronError):
    """The server does not answer."""


class RemoteFinetuning:
    """OpenAI's files and finetuning jobs of a server."""

    def __init__(self, url: str, api_key: str | None = None, *, timeout: float = 60.0, patience: float = 60.0) -> None:
        """Take the server's address.

        Args:
            url: the server's address, with or without `/v1`.
            api_key: if the server asks for one.
            timeout: seconds for an answer to begin.
            patience: seconds for which `follow` waits for a server that does not answer, such as one that restarts.

        Raises:
            FlextronError: this is not a URL of a server.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FlextronError(f"{url!r} is not a URL of a server; give one such as http://127.0.0.1:8000")
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._timeout, self._patience = timeout, patience

    def upload(self, path: Path) -> str:
        """Send a file of examples; gives its id.

        Raises:
            FlextronError: there is no such file, or the server does not take it.
        """
        if not path.is_file():
            raise FlextronError(f"{path} is not a file; give a JSONL file of examples")
        self._get("?limit=1")  # a server that refuses may do so before it has read the file, which looks like a fault
        boundary = secrets.token_hex(16)
        # the name is told in the form's own words; the server shows it and makes no path of it
        name = quote(path.name, safe=" ()[]{}+,;=@&")
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        size = len(head) + path.stat().st_size + len(tail)
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Content-Length": str(size)}

        def pieces() -> Iterator[bytes]:
            yield head
            with path.open("rb") as file:
                while piece := file.read(_PIECE):
                    yield piece
            yield tail

        made = self._ask(Request(f"{self._base}/files", pieces(), headers, method="POST"))
        return str(made["id"])

    def create(
        self,
        model: str,
        file_id: str,
        *,
        validation: str | None = None,
        suffix: str | None,
        seed: int | None,
        hyperparameters: dict[str, Any],
    ) -> dict[str, Any]:
        """Begin a job, and give it as the server words it.

        Args:
            model: the server's name of it.
            file_id: id of the examples.
            validation: id of the file that is scored in between.
            suffix: suffix of the finetuned model's name.
            seed: seed of initial weights and data order.
            hyperparameters: hyperparameters of the job.

        Raises:
            FlextronError: the server does not take it.
        """
        method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        body = {"model": model, "training_file": file_id, "suffix": suffix, "seed": seed, "method": method}
        return self._post("", body | {"validation_file": validation})

    def job(self, job_id: str) -> dict[str, Any]:
        """How a job stands.

        Raises:
            FlextronError: there is none, or the server does not answer.
        """
        return self._get(f"/{quote(job_id, safe='')}")

    def cancel(self, job_id: str) -> dict[str, Any]:
        """End a job for good; errors as for `job`, and if it has ended already."""
        return self._post(f"/{quote(job_id, safe='')}/cancel", {})

    def follow(self, job_id: str, seconds: float = 0.5) -> Iterator[dict[str, Any]]:
        """Events of a job from its beginning until it has ended, the oldest first.

        Args:
            job_id: id of the job.
            seconds: between two looks.

        Raises:
            FlextronError: there is none, or the server did not answer for a while.
        """
        last: str | None = None
        answered = time.monotonic()
        while True:
            try:
                # the job first: what happened before it ended is among the events then
                has_ended = self.job(job_id)["status"] in _ENDED
                events = self._events_since(job_id, last)
            except UnreachableError:
                if time.monotonic() - answered > self._patience:
                    raise
                time.sleep(seconds)
                continue
            answered = time.monotonic()
            yield from events
            last = events[-1]["id"] if events else last
            if has_ended:
                return
            time.sleep(seconds)

    def _events_since(self, job_id: str, last: str | None) -> list[dict[str, Any]]:
        """Events after one, or all, the oldest first."""
        found: list[dict[str, Any]] = []
        after: dict[str, str] = {}
        while True:
            query = urlencode({"limit": str(_PAGE), **after})
            page = self._get(f"/{quote(job_id, safe='')}/events?{query}")
            for event in page["data"]:
                if event["id"] == last:
                    return found[::-1]
                found.append(event)
            if not page["has_more"]:
                return found[::-1]
            after = {"after": found[-1]["id"]}

    def _get(self, path: str) -> dict[str, Any]:
        return self._ask(Request(f"{self._base}/fine_tuning/jobs{path}"))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        return self._ask(Request(f"{self._base}/fine_tuning/jobs{path}", json.dumps(body).encode(), headers))

    def _ask(self, request: Request) -> dict[str, Any]:
        for name, value in self._headers.items():
            request.add_unredirected_header(name, value)
        try:
            with urlopen(request, timeout=self._timeout) as answer:
                found = json.load(answer)
        except HTTPError as error:
            with error:
                refused = _refusal(error)
            raise refused from error
        except (URLError, OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UnreachableError(f"{self._base} does not answer ({reason}); is the server running?") from error
        except ValueError as error:
            raise FlextronError(f"{self._base} answers with no JSON; is it a flextron server?") from error
        if not isinstance(found, dict):
            raise FlextronError(f"{self._base} answers with no JSON object; is it a flextron server?")
        return found


def _refusal(error: HTTPError) -> FlextronError:
    """What the server says about a request that it does not take."""
    try:
        told = json.load(error)["error"]
        message, code = str(told["message"]), told["code"]
    except (ValueError, KeyError, TypeError, OSError):
        return FlextronError(f"{error.url} answers {error.code} {error.reason}")
    if error.code == 404 and code is None:
        return FlextronError(f"the server takes no finetuning jobs ({message}); start it with --state-directory")
    kind = UnreachableError if error.code in (429, 503) else FlextronError
    return kind(f"the server says: {message}")
