"""`/v1/files`, driven by OpenAI's client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from flextron import ElasticModel
from tests.server.test_refusals import assert_refused
from tests.server.tuning import Tuning, tuning

CONTENT = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture(scope="module")
def served(model: ElasticModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuning]:
    with tuning(model, tmp_path_factory.mktemp("files") / "state", max_file_mb=0.2) as made:
        yield made


def test_a_file_comes_back_as_it_went(served: Tuning) -> None:
    client = served.client()
    content = bytes(range(256)) * 300 + b"\r\n--boundary\r\n\r\n"
    made = client.files.create(file=("träin.jsonl", content), purpose="fine-tune")
    assert (made.object, made.purpose, made.status, made.bytes) == ("file", "fine-tune", "processed", len(content))
    assert made.filename == "träin.jsonl"
    assert client.files.retrieve(made.id) == made
    assert client.files.wait_for_processing(made.id) == made
    assert client.files.content(made.id).content == content
    assert client.files.delete(made.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    assert not (served.jobs.directory.files / made.id).exists()


def test_files_from_disk_and_as_bytes(served: Tuning, tmp_path: Path) -> None:
    client = served.client()
    (tmp_path / "data.jsonl").write_bytes(CONTENT)
    files: list[Any] = [tmp_path / "data.jsonl", (tmp_path / "data.jsonl").read_bytes(), ("b", CONTENT, "text/plain")]
    for file in files:
        assert client.files.content(client.files.create(file=file, purpose="fine-tune").id).content == CONTENT
    empty = client.files.create(file=("empty", b""), purpose="fine-tune")
    assert empty.bytes == 0


def test_pages(model: ElasticModel, tmp_path: Path) -> None:
    with tuning(model, tmp_path / "state") as made:
        client = made.client()
        assert client.files.list().data == []
        ids = [client.files.create(file=(f"{i}", CONTENT), purpose="fine-tune").id for i in range(7)]
        assert [file.id for file in client.files.list(limit=3)] == ids[::-1]
        assert [file.id for file in client.files.list(limit=2, order="asc", purpose="fine-tune")] == ids
        assert [file.id for file in client.files.list(after=ids[2])] == ids[1::-1]
        assert client.files.list(purpose="batch").data == []
        page = client.files.list(limit=7)
        assert not page.has_more
        for query in ("limit=0", "limit=x", "limit=10001", "limit=-1", "limit=", "limit=1e3", "order=up"):
            assert_refused(httpx.get(f"{made.server.url}/v1/files?{query}"), 400, query.split("=")[0])
        assert_refused(httpx.get(f"{made.server.url}/v1/files?after=file-x"), 404, "file-x")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("..", "file"),
        ("a\\..\\b.jsonl", "b.jsonl"),
        ("/etc/shadow", "shadow"),
        ("a\0b", "a%00b"),
        ("%2e%2e%2fx", "%2e%2e%2fx"),
        ("x" * 999, "x" * 255),
        ("lock", "lock"),
        ("state.sqlite", "state.sqlite"),
    ],
)
def test_names_lead_nowhere(served: Tuning, name: str, kept: str) -> None:
    state = served.jobs.directory.path
    before = sorted(p.name for p in state.parent.rglob("*"))
    made = served.client().files.create(file=(name, CONTENT), purpose="fine-tune")
    assert made.filename == kept
    assert sorted({p.name for p in state.parent.rglob("*")} - set(before)) == [made.id]


@pytest.mark.parametrize(
    "path", ["..%2flock", "%2e%2e", "..", "state.sqlite", ".", "%00", "a" * 5000, "' OR 1=1 --", "é"]
)
def test_ids_lead_nowhere(served: Tuning, path: str) -> None:
    with httpx.Client(base_url=served.server.url) as client:
        for suffix in ("", "/content"):
            answer = client.get(f"/v1/files/{path}{suffix}")
            # `..` is resolved by the client, to paths that are not there either
            assert answer.status_code in (404, 405) or answer.json()["object"] == "list"
        assert client.delete(f"/v1/files/{path}").status_code in (404, 405)
    assert (served.jobs.directory.path / "lock").exists()
    assert (served.jobs.directory.path / "state.sqlite").exists()


def test_forms_that_do_not_do(served: Tuning) -> None:
    with httpx.Client(base_url=served.server.url) as client:
        file, purpose = {"file": ("a", CONTENT)}, {"purpose": "fine-tune"}
        assert assert_refused(client.post("/v1/files", files=file), 400)["param"] == "purpose"
        answer = client.post("/v1/files", files=file, data={"purpose": "batch"})
        assert assert_refused(answer, 400, "'fine-tune'")["param"] == "purpose"
        answer = client.post("/v1/files", files={"other": ("a", b"")}, data=purpose)
        assert assert_refused(answer, 400, "no file")["param"] == "file"
        answer = client.post("/v1/files", files={"file": (None, b"a")}, data=purpose)
        assert_refused(answer, 400, "no file")
        data = purpose | {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        assert_refused(client.post("/v1/files", files=file, data=data), 400, "expire")
        assert_refused(client.post("/v1/files", json={"file": "a"}), 400, "multipart/form-data")
        head = {"content-type": "multipart/form-data; boundary=x"}
        assert_refused(client.post("/v1/files", content=b"", headers=head), 400, "empty")
        assert_refused(client.post("/v1/files", content=b"--x\r\n", headers=head), 400, "malformed")
        assert_refused(client.put("/v1/files"), 405)


def test_files_that_are_too_large(served: Tuning) -> None:
    client = served.client()
    assert client.files.create(file=("a", b"a" * 200_000), purpose="fine-tune").bytes == 200_000
    for size in (200_001, 300_000, 3_000_000):
        with pytest.raises(openai.APIStatusError) as refused:
            client.files.create(file=("a", b"a" * size), purpose="fine-tune")
        assert refused.value.status_code == 413
    state = served.jobs.directory
    assert {p.name for p in state.files.iterdir()} == {f.id for f in client.files.list()}


def test_a_key_is_needed(model: ElasticModel, tmp_path: Path) -> None:
    with tuning(model, tmp_path / "state", api_key="secret") as made:
        for path in ("/v1/files", "/v1/files/a", "/v1/fine_tuning/jobs"):
            assert_refused(httpx.get(f"{made.server.url}{path}"), 401)
        assert made.client(api_key="secret").files.list().data == []


def test_a_server_without_a_state_directory_has_no_files(server: Any) -> None:
    for path in ("/v1/files", "/v1/fine_tuning/jobs"):
        assert_refused(httpx.get(f"{server.url}{path}"), 404)
