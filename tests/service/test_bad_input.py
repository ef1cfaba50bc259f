"""Bad input: each gets a clear error, and leaves nothing behind."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from running import BASE, Service, chat_rows, make_context, serving, wait_until
from sqlalchemy import func, select

from luthier.store.tables import UploadPart

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def small(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, service_database: Callable[[], str]
) -> Iterator[Service]:
    """An API without a worker that takes files of 2 MB."""
    settings: dict[str, Any] = {"max_file_bytes": 2 * MEGABYTE, "start_seconds": 0.2}
    context = make_context(tmp_path_factory.mktemp("small"), tiny_llama, service_database(), **settings)
    with serving(context) as running:
        running.tenant("acme")
        yield running


@pytest.fixture
def caller(small: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key=small.keys["acme"], max_retries=0) as client:
        yield client


def stored(service: Service) -> list[str]:
    root = service.context.blobs.folder
    assert root is not None
    return sorted(str(path) for path in root.rglob("*") if path.is_file())


class Zeros(io.RawIOBase):
    """A file of spaces of any size that takes no memory."""

    def __init__(self, num_bytes: int) -> None:
        self.left = num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self.left)
        buffer[:size] = b" " * size
        self.left -= size
        return size


def test_a_file_that_is_too_large(small: Service, caller: openai.OpenAI) -> None:
    before = stored(small)
    for num_bytes in (2 * MEGABYTE + 1, 5 * MEGABYTE):
        with pytest.raises(openai.APIStatusError) as refused:
            caller.files.create(file=("big.jsonl", b" " * num_bytes), purpose="fine-tune")
        assert refused.value.status_code == 413
        assert "larger than" in refused.value.message
    assert stored(small) == before


@pytest.fixture
def roomy(tiny_llama: Path, tmp_path: Path, service_database: Callable[[], str]) -> Iterator[Service]:
    """An API without a worker, with the limits that hold by default."""
    with serving(make_context(tmp_path, tiny_llama, service_database(), start_seconds=0.2)) as running:
        running.tenant("acme")
        yield running


def test_600_megabytes_are_refused_in_words(roomy: Service) -> None:
    """As a body whose length is not announced: what comes past the limit is thrown away."""
    before = stored(roomy)
    head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="t.jsonl"\r\n\r\n'
    source = io.BufferedReader(Zeros(600 * MEGABYTE))
    with httpx.Client(timeout=60) as client:
        response = client.post(
            f"{roomy.url}/v1/files",
            headers={
                "authorization": f"Bearer {roomy.keys['acme']}",
                "content-type": "multipart/form-data; boundary=x",
            },
            content=itertools.chain([head], iter(lambda: source.read(4 * MEGABYTE), b"")),
        )
    assert response.status_code == 413
    assert response.json()["error"]["message"].startswith("The request is larger than 513 MB")
    assert stored(roomy) == before


def test_a_zip_bomb_named_jsonl(caller: openai.OpenAI) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.jsonl", b"0" * (100 * MEGABYTE))
    for content, what in ((packed.getvalue(), "zip"), (gzip.compress(b"0" * (100 * MEGABYTE)), "gzip")):
        file = caller.files.create(file=("train.jsonl", content), purpose="fine-tune")
        started = time.monotonic()
        with pytest.raises(openai.BadRequestError, match=what):
            caller.fine_tuning.jobs.create(model=BASE, training_file=file.id)
        assert time.monotonic() - started < 20.0


def test_ten_thousand_wrong_lines(caller: openai.OpenAI) -> None:
    file = caller.files.create(file=("wrong.jsonl", b'{"a": 1}\n' * 10_000), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as refused:
        caller.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    assert "10,000 rows cannot be trained on" in refused.value.message
    assert "wrong.jsonl, line 1" in refused.value.message
    assert "9,995 more" in refused.value.message
    assert len(refused.value.message) < 3000


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/cron.d/x.jsonl", "x.jsonl"),
        ("/abs/y.jsonl", "y.jsonl"),
        ("a\\b\\z.jsonl", "z.jsonl"),
        ("ä 漢.jsonl", "ä 漢.jsonl"),
    ],
)
def test_a_path_in_a_file_name_is_only_shown(small: Service, caller: openai.OpenAI, name: str, shown: str) -> None:
    file = caller.files.create(file=(name, chat_rows(1)), purpose="fine-tune")
    assert file.filename == shown
    assert caller.files.content(file.id).read() == chat_rows(1)
    assert all("/tenants/org-" in path for path in stored(small))


@pytest.mark.parametrize("name", ["..", "x.exe", "x.jsonl.zip", "\u202e"])
def test_other_names_and_purposes_are_refused(caller: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError):
        caller.files.create(file=(name, b"{}"), purpose="fine-tune")
    bad: Any = "evil"
    with pytest.raises(openai.BadRequestError, match="is not one of"):
        caller.files.create(file=("a.jsonl", b"{}"), purpose=bad)


@pytest.mark.parametrize(
    "model", ["../", "../../x", "ft:../x", "ft:tiny:acme::../../x", "%2e%2e%2f", "a\x00b", "tiny/../tiny"]
)
def test_a_model_id_with_a_path(caller: openai.OpenAI, model: str) -> None:
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
        caller.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}])
    file = caller.files.create(file=("t.jsonl", chat_rows(12)), purpose="fine-tune")
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
        caller.fine_tuning.jobs.create(model=model, training_file=file.id)


@pytest.mark.parametrize("what", ["file", "part", "json"])
def test_a_body_cut_half_way_leaves_nothing(small: Service, caller: openai.OpenAI, what: str) -> None:
    upload = caller.uploads.create(bytes=9, filename="x.jsonl", mime_type="a/b", purpose="fine-tune")
    tenant = small.context.tenants.get("acme").id
    before, files = stored(small), len(small.context.files.page(tenant).items)
    path, field = {
        "file": ("/v1/files", "file"),
        "part": (f"/v1/uploads/{upload.id}/parts", "data"),
        "json": ("/v1/uploads", ""),
    }[what]
    form = f'--b\r\ncontent-disposition: form-data; name="{field}"; filename="t.jsonl"\r\n\r\n{{"messages"'
    kind, sent = ("application/json", '{"bytes": 5') if what == "json" else ("multipart/form-data; boundary=b", form)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {small.keys['acme']}\r\n"
        f"content-type: {kind}\r\ncontent-length: 100000\r\n\r\n"
    )
    parts = urlsplit(small.url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0))) as link:
        link.sendall((head + sent).encode())
        time.sleep(0.2)
    time.sleep(0.3)
    wait_until(lambda: stored(small) == before)
    assert len(small.context.files.page(tenant).items) == files
    with small.context.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(UploadPart)) == 0
    assert caller.uploads.cancel(upload.id).status == "cancelled"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": 1}',
        b"\xff\xfe",
        b'{"a":' * 2000,
        json.dumps({"model": "x" * 600}).encode(),
    ],
)
def test_bodies_that_are_no_requests(small: Service, body: bytes) -> None:
    headers = {"authorization": f"Bearer {small.keys['acme']}", "content-type": "application/json"}
    for path in ("/v1/fine_tuning/jobs", "/v1/chat/completions", "/v1/uploads", "/v1/batches"):
        response = httpx.post(small.url + path, headers=headers, content=body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_nobody_to_answer_says_when_to_come_back(caller: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as refused:
        caller.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "x"}])
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["retry-after"]) <= 120


def test_health_and_metrics(small: Service) -> None:
    assert httpx.get(f"{small.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{small.url}/readyz").json() == {"status": "ready"}
    text = httpx.get(f"{small.url}/metrics").text
    assert "luthier_http_requests_total{" in text
    assert "acme" not in text
