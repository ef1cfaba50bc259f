"""Webhooks, backup and restore, erasure, shutdown, eviction, several databases: what an operator relies on."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running import BASE, Service, chat_rows, make_context, serving, wait_for, wait_until, working
from sqlalchemy import String, cast, select

from luthier.errors import RunError
from luthier.registry.backup import back_up, restore
from luthier.registry.placement import live_workers
from luthier.registry.webhooks import AddressError, permitted_address
from luthier.service.background import pinned_request
from luthier.service.wire import JsonLines
from luthier.store.blobs import Blobs
from luthier.store.tables import Table
from luthier.worker.served_bases import ServedBases

QUICK: dict[str, Any] = {"train": {"max_steps": 2, "checkpoint_every": 1}, "method": {"type": "lora", "rank": 2}}


@pytest.fixture
def fresh(database_url: str, tiny_llama: Path, tmp_path: Path) -> Iterator[Service]:
    """A service of the test's own, on each kind of database."""
    context = make_context(tmp_path / "data", tiny_llama, database_url)
    with serving(context) as running:
        running.tenant("acme")
        yield running


def client_of(service: Service, name: str = "acme") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.keys[name], max_retries=0)


def tune(client: openai.OpenAI, own: dict[str, Any] = QUICK, **values: Any) -> Any:
    file = client.files.create(file=("t.jsonl", chat_rows(20)), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model=BASE, training_file=file.id, extra_body={"luthier": own}, **values)


class Ear(BaseHTTPRequestHandler):
    """Hears webhooks; fails the first call, so that it is retried."""

    heard: list[tuple[dict[str, str], bytes]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        Ear.heard.append(({key.lower(): value for key, value in self.headers.items()}, body))
        self.send_response(500 if len(Ear.heard) == 1 else 200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("luthier.registry.webhooks.RETRY_SECONDS", (0.2,) * 6)
    Ear.heard = []
    server = HTTPServer(("127.0.0.1", 0), Ear)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook"
    server.shutdown()
    server.server_close()


def test_a_jobs_end_is_told_signed_and_again_until_it_is_heard(fresh: Service, ear: str) -> None:
    client = client_of(fresh)
    hook = client.post("/luthier/webhooks", cast_to=httpx.Response, body={"url": ear}).json()
    job = tune(client)
    client.fine_tuning.jobs.cancel(job.id)
    wait_until(lambda: len(Ear.heard) >= 2)
    assert len(Ear.heard) == 2
    headers, body = Ear.heard[1]
    assert Ear.heard[0][1] == body
    event = client.webhooks.unwrap(body.decode(), headers, secret=hook["secret"])
    assert (event.type, event.data.id) == ("fine_tuning.job.cancelled", job.id)  # type: ignore[union-attr]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.decode() + " ", headers, secret=hook["secret"])


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/x",
        "https://127.0.0.1/x",
        "https://10.0.0.1/x",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/x",
        "https://[::ffff:10.0.0.1]/x",
        "https://localhost/x",
        "https://user:pass@example.com/",
        "ftp://example.com",
        "https://",
        "https://2130706433/",
    ],
)
def test_webhooks_go_to_no_private_address(url: str) -> None:
    with pytest.raises(AddressError):
        permitted_address(url, may_be_private=False)


def test_a_webhooks_name_cannot_come_to_mean_another_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was looked at is the one that is called; name and certificate are still the URL's."""
    meant = ["93.184.215.14", "169.254.169.254"]

    def look_up(host: str, port: int, **_: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (meant.pop(0), port))]

    monkeypatch.setattr("luthier.registry.webhooks.socket.getaddrinfo", look_up)
    url = "https://hooks.example.com:8443/a?b=c"
    request = pinned_request(url, permitted_address(url, may_be_private=False), {"webhook-id": "x"}, "{}")
    assert str(request.url) == "https://93.184.215.14:8443/a?b=c"
    assert request.headers["host"] == "hooks.example.com:8443"
    assert request.extensions["sni_hostname"] == "hooks.example.com"
    with pytest.raises(AddressError, match="private"):
        permitted_address(url, may_be_private=False)


def test_jobs_run_the_same_on_both_databases(fresh: Service, tmp_path: Path) -> None:
    client = client_of(fresh)
    with working(fresh.context, tmp_path / "worker"):
        jobs = [tune(client) for _ in range(3)]
        done = [wait_for(job.id, client) for job in jobs]
        assert [job.status for job in done] == ["succeeded"] * 3, [job.error for job in done]
        answer = client.chat.completions.create(
            model=str(done[0].fine_tuned_model), messages=[{"role": "user", "content": "red"}], max_tokens=3
        )
        assert answer.choices
        assert client.fine_tuning.jobs.list(metadata={"a": "b"}).data == []


def test_two_api_processes_are_one_service(fresh: Service, database_url: str, tiny_llama: Path, tmp_path: Path) -> None:
    """What one was told the other knows; they count requests together."""
    fresh.context.tenants.update("acme", max_requests_per_minute=80)
    beside = make_context(tmp_path / "data", tiny_llama, database_url)
    with serving(beside) as second, working(fresh.context, tmp_path / "worker"):
        second.keys = fresh.keys
        one, two = client_of(fresh), client_of(second)
        job = tune(one)
        done = wait_until_ended(job.id, two)
        answer = two.chat.completions.create(
            model=str(done.fine_tuned_model), messages=[{"role": "user", "content": "red"}], max_tokens=3
        )
        assert answer.choices
        with pytest.raises(openai.RateLimitError):
            [client.models.list() for client in (one, two) * 90]  # the minute may turn in between


def wait_until_ended(job: str, client: openai.OpenAI) -> Any:
    """As `wait_for`, with few requests."""
    for _ in range(150):
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status in ("succeeded", "failed"):
            break
        time.sleep(1.0)
    assert found.status == "succeeded", found.error
    return found


def test_a_worker_that_is_asked_to_end_saves_its_jobs(fresh: Service, tmp_path: Path) -> None:
    client = client_of(fresh)
    with working(fresh.context, tmp_path / "one"):
        job = tune(client, {"train": {"epochs": 5000.0}, "method": {"type": "lora", "rank": 2}})
        wait_for(job.id, client, "running")
        while client.fine_tuning.jobs.retrieve(job.id).to_dict()["luthier"]["step"] < 3:  # type: ignore[index]
            time.sleep(0.05)
    left = client.fine_tuning.jobs.retrieve(job.id)
    assert left.status == "queued"
    step = left.to_dict()["luthier"]["step"]  # type: ignore[index]
    saved = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert saved.step_number == step
    with working(fresh.context, tmp_path / "two"):
        wait_for(job.id, client, "running")
        while client.fine_tuning.jobs.retrieve(job.id).to_dict()["luthier"]["step"] <= step:  # type: ignore[index]
            time.sleep(0.05)
        client.fine_tuning.jobs.cancel(job.id)
    steps = [e.data["step"] for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"]  # type: ignore[index]
    assert len(steps) == len(set(steps))


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_service_over_postgresql_and_s3(
    database_url: str, s3_bucket: tuple[str, dict[str, Any]], tiny_llama: Path, tmp_path: Path
) -> None:
    """Two workers one after another: what the second goes on from, it has from the bucket alone."""
    storage, options = s3_bucket
    context = make_context(tmp_path / "api", tiny_llama, database_url, storage=storage, storage_options=options)
    with serving(context) as service:
        service.tenant("acme")
        client = client_of(service)
        with working(context, tmp_path / "one"):
            job = tune(client, {"train": {"epochs": 10.0}, "method": {"type": "lora", "rank": 2}})
            while client.fine_tuning.jobs.retrieve(job.id).to_dict()["luthier"]["step"] < 3:  # type: ignore[index]
                time.sleep(0.05)
        with working(context, tmp_path / "two"):
            done = wait_for(job.id, client)
            assert done.status == "succeeded", done.error
            answer = client.chat.completions.create(
                model=str(done.fine_tuned_model), messages=[{"role": "user", "content": "red"}], max_tokens=3
            )
            assert answer.choices
        assert client.files.content(done.result_files[0]).read().startswith(b"step,")
    assert not (tmp_path / "api" / "blobs").exists()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_adapters_beyond_the_room_come_and_go(fresh: Service, tmp_path: Path) -> None:
    client = client_of(fresh)
    with working(fresh.context, tmp_path / "worker", max_slots=1) as worker:
        models = [str(wait_for(tune(client, seed=n).id, client).fine_tuned_model) for n in range(3)]
        ask: dict[str, Any] = {"messages": [{"role": "user", "content": "red"}], "max_tokens": 4, "temperature": 0}
        first = [client.chat.completions.create(model=m, **ask).choices[0].message.content for m in models]
        again = [client.chat.completions.create(model=m, **ask).choices[0].message.content for m in models]
        assert first == again
        wait_until(lambda: len(worker._slots) <= 1)  # an adapter is given back just after the last word of its reply


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_idle_worker_gives_its_base_back(fresh: Service, tmp_path: Path) -> None:
    client = client_of(fresh)
    ask: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "red"}], "max_tokens": 2}
    for folder in ("one", "two"):  # it goes, and another comes when it is asked for
        with working(fresh.context, tmp_path / folder) as worker:
            assert client.chat.completions.create(**ask).choices
            assert (tmp_path / folder).exists()
            worker._options = replace(worker._options, idle_seconds=0.5)  # not before it has answered
            wait_until(lambda: num_workers(fresh) == 0)
        assert not (tmp_path / folder).exists(), "nothing is left behind"


def num_workers(service: Service) -> int:
    with service.context.database.reading() as session:
        return len(live_workers(session, None, service.context.database.now(session)))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_what_is_logged_of_a_request_has_its_id(fresh: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Also what is logged in the middle of it, and of a defect."""
    client = client_of(fresh)
    file = client.files.create(file=("t.jsonl", chat_rows(3)), purpose="fine-tune")
    fresh.context.blobs.delete(fresh.context.files.get(fresh.context.tenants.get("acme").id, file.id).blob)
    lines: list[dict[str, Any]] = []

    def lines_of(request: str | None) -> list[dict[str, Any]]:
        return [line for line in list(lines) if line.get("request_id") == request]

    handler = logging.Handler()
    handler.emit = lambda record: lines.append(json.loads(JsonLines().format(record)))  # type: ignore[method-assign]
    logger = logging.getLogger("luthier")
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO):
            with pytest.raises(openai.InternalServerError) as lost:
                client.files.content(file.id)
            # The line of a request follows its answer.
            wait_until(lambda: "request" in [line["message"] for line in lines_of(lost.value.request_id)])
    finally:
        logger.removeHandler(handler)
    assert lost.value.status_code == 503
    own = lines_of(lost.value.request_id)
    assert [line["message"] for line in own] == ["request failed", "request"]
    assert "is not there" in own[0]["problem"]
    assert (own[1]["method"], own[1]["route"], own[1]["status"]) == ("GET", "/v1/files/{file_id}/content", 503)
    assert own[1]["tenant"] == fresh.context.tenants.get("acme").id


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_service_without_its_storage_is_not_ready(fresh: Service) -> None:
    root = fresh.context.blobs.folder
    assert root is not None
    assert httpx.get(f"{fresh.url}/readyz").status_code == 200
    shutil.rmtree(root, ignore_errors=True)
    root.write_bytes(b"in the way")
    answer = httpx.get(f"{fresh.url}/readyz")
    assert (answer.status_code, answer.json()) == (503, {"status": "not ready", "failing": ["storage"]})
    assert httpx.get(f"{fresh.url}/healthz").status_code == 200


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_backup_and_restore(fresh: Service, tmp_path: Path) -> None:
    client = client_of(fresh)
    with working(fresh.context, tmp_path / "worker"):
        job = wait_for(tune(client).id, client)
    back_up(fresh.context.database, fresh.context.blobs, tmp_path / "backup")
    url, blobs = f"sqlite:///{tmp_path / 'new' / 'luthier.db'}", Blobs(str(tmp_path / "new" / "blobs"))
    restore(tmp_path / "backup", url, blobs)
    with pytest.raises(RunError, match="there already"):
        restore(tmp_path / "backup", url, blobs)
    again = make_context(tmp_path / "new", Path(fresh.context.settings.bases[BASE]), url)
    with serving(again) as restored:
        restored.keys = fresh.keys
        found = client_of(restored)
        assert found.fine_tuning.jobs.retrieve(job.id).fine_tuned_model == job.fine_tuned_model
        assert found.files.content(job.training_file).read() == chat_rows(20)
    (tmp_path / "backup/blobs/tenants").rename(tmp_path / "lost")
    with pytest.raises(RunError, match="lacks"):
        restore(tmp_path / "backup", f"sqlite:///{tmp_path / 'third' / 'x.db'}", Blobs(str(tmp_path / "third/blobs")))


def test_a_tenants_data_is_erased_for_good(fresh: Service, tmp_path: Path) -> None:
    fresh.tenant("stays")
    fresh.tenant("operator", ("admin",))
    gone, stays, operator = (client_of(fresh, name) for name in ("acme", "stays", "operator"))
    kept = stays.files.create(file=("k.jsonl", b"kept-text"), purpose="fine-tune")
    gone.files.create(file=("a-telling-name.jsonl", b"telling-text"), purpose="fine-tune")
    tenant = fresh.context.tenants.get("acme").id
    with working(fresh.context, tmp_path / "worker") as worker:
        done = wait_for(tune(gone).id, gone)
        assert done.status == "succeeded"
        ask: dict[str, Any] = {"messages": [{"role": "user", "content": "red"}], "max_tokens": 2}
        assert gone.chat.completions.create(model=str(done.fine_tuned_model), **ask).choices
        assert list((tmp_path / "worker" / "adapters").iterdir())
        operator.delete(f"/luthier/admin/tenants/{tenant}", cast_to=httpx.Response)
        # A worker forgets what it has of a tenant that is no more.
        wait_until(lambda: not (list((tmp_path / "worker" / "adapters").iterdir()) or worker._tenants()))
    with pytest.raises(openai.AuthenticationError):
        gone.models.list()
    root = fresh.context.blobs.folder
    assert root is not None
    assert not (root / "tenants" / tenant).exists()
    assert stays.files.content(kept.id).read() == b"kept-text"
    with fresh.context.database.reading() as session:
        for table in Table.metadata.sorted_tables:
            for row in session.execute(select(*(cast(column, String) for column in table.columns))):
                assert tenant not in str(row), table.name
    for path in (tmp_path / "data").rglob("*"):
        content = content_of(path)
        assert not any(mark in content for mark in (b"a-telling-name", b"telling-text", tenant.encode())), path


def content_of(path: Path) -> bytes:
    """A file's bytes; none of what is no file, or not any more: SQLite's log comes and goes."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:
        return b""


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_content_filter_stops_prompts_and_replies(tiny_llama: Path, tmp_path: Path, database_url: str) -> None:
    context = make_context(tmp_path / "data", tiny_llama, database_url, blocked_words=("secretword",))
    with serving(context) as service, working(context, tmp_path / "worker"):
        service.tenant("acme")
        client = client_of(service)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "a SecretWord"}])
        assert refused.value.code == "content_filter"
        schema = {"type": "object", "properties": {"a": {"const": "secretword"}}, "required": ["a"]}
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = client.chat.completions.create(
            model=BASE, messages=[{"role": "user", "content": "x"}], response_format=form, max_tokens=60
        )
        assert answer.choices[0].finish_reason == "content_filter"
        ask: dict[str, Any] = {
            "messages": [{"role": "user", "content": "x"}],
            "response_format": form,
            "max_tokens": 60,
        }
        stream = list(client.chat.completions.create(model=BASE, **ask, stream=True))
        assert stream[-1].choices[0].finish_reason == "content_filter"
        assert "secretword" not in "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert "secretword" not in (answer.choices[0].message.content or "")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_quotas_hold_over_the_surface(fresh: Service, tmp_path: Path) -> None:
    """Storage, running jobs and trained tokens a day; requests a minute stand in test_contract.py."""
    fresh.tenant("bound", max_storage_bytes=20_000_000, max_running_jobs=1, max_trained_tokens_per_day=600)
    client = client_of(fresh, "bound")
    with pytest.raises(openai.RateLimitError, match="storage quota") as refused:
        client.uploads.create(bytes=20_000_001, filename="x.jsonl", mime_type="a/b", purpose="fine-tune")
    assert refused.value.code == "storage_quota_exceeded"
    with working(fresh.context, tmp_path / "worker"):
        first, second = (tune(client, {"train": {"epochs": 50.0}}, seed=n) for n in range(2))
        events = client.fine_tuning.jobs.list_events
        wait_until(lambda: any(e.level == "warn" for e in events(first.id, limit=100).data))
        assert client.fine_tuning.jobs.retrieve(first.id).status == "queued"
        waiting = client.fine_tuning.jobs.retrieve(second.id)
        assert (waiting.status, waiting.to_dict()["luthier"]["step"]) == ("queued", 0)  # type: ignore[index]
    trained = sum(row["trained_tokens"] for row in client.get("/luthier/usage", cast_to=httpx.Response).json()["data"])
    # Of some 20,000: steps that were on their way when the quota was reached are counted too.
    assert 600 <= trained < 5000


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_prices_estimates_and_costs(fresh: Service, tmp_path: Path) -> None:
    fresh.tenant("operator", ("admin",))
    operator, client = client_of(fresh, "operator"), client_of(fresh)
    price = {"trained": 8.0, "prompt": 1.0, "generated": 2.0}
    operator.post("/luthier/admin/prices/tiny", cast_to=httpx.Response, body=price)
    with working(fresh.context, tmp_path / "worker"):
        job = tune(client, {"train": {"epochs": 2.0}, "method": {"type": "lora", "rank": 2}})
        estimate = job.to_dict()["luthier"]["estimate"]
        done = wait_for(job.id, client)
    own = done.to_dict()["luthier"]
    assert done.trained_tokens == estimate["trained_tokens"], "tokens were counted, not guessed"
    assert own["cost"] == pytest.approx(estimate["cost"]) == pytest.approx(done.trained_tokens * 8.0 / 1e6, abs=1e-6)
    rows = operator.get("/luthier/admin/usage", cast_to=httpx.Response).json()["data"]
    assert sum(row["trained_tokens"] for row in rows) == done.trained_tokens


def test_the_catalogue_is_served_where_no_base_is_named() -> None:
    served = ServedBases({})
    assert served.find("smollm2-135m-instruct") is not None
    assert served.find("/etc") is None
    assert served.source("smollm2-135m-instruct") == "smollm2-135m-instruct"
