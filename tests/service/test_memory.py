"""A service whose workers have too little memory: what waits says so, goes on once there is some, or fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from running import BASE, Service, chat_rows, make_context, serving, wait_for, wait_until, working

from luthier.registry.seam import Room
from luthier.registry.work import StoredWork
from luthier.store.held_base import HeldBase

GIB = 2**30
QUICK: dict[str, Any] = {"train": {"max_steps": 2}, "method": {"type": "lora", "rank": 2}}


@pytest.fixture
def service(tiny_llama: Path, tmp_path: Path) -> Iterator[Service]:
    context = make_context(tmp_path / "data", tiny_llama, lease_seconds=1.0, start_seconds=0.2)
    with serving(context) as running:
        running.tenant("acme")
        yield running


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that a worker finds free for jobs: a list of one, to be changed."""
    from luthier.engine import memory
    from luthier.worker import service_worker  # before the change, so that what it imports has the true one

    found = [1000]
    for module in (memory, service_worker):
        monkeypatch.setattr(module, "available_bytes", lambda device: found[0])
    return found


def client_of(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.keys["acme"], max_retries=0)


def tune(client: openai.OpenAI) -> str:
    file = client.files.create(file=("t.jsonl", chat_rows(20)), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model=BASE, training_file=file.id, extra_body={"luthier": QUICK}).id


def messages(client: openai.OpenAI, job: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job, limit=50)]


def test_a_job_waits_for_memory_says_so_and_goes_on(service: Service, free: list[int], tmp_path: Path) -> None:
    client = client_of(service)
    job = tune(client)
    with working(service.context, tmp_path / "worker"):
        wait_until(lambda: any("waits for memory" in text for text in messages(client, job)))
        assert client.fine_tuning.jobs.retrieve(job).status == "queued"
        (told,) = [text for text in messages(client, job) if "waits for memory" in text]
        assert told.startswith("The job waits for memory: it needs ")
        assert told.endswith("and at most 0.00 GiB are free for it now")
        free[0] = 2**40  # others have ended
        assert wait_for(job, client).status == "succeeded"


def test_a_job_that_could_never_fit_fails(
    service: Service, free: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.worker.room.total_bytes", lambda device: 0)
    client = client_of(service)
    job = tune(client)
    with working(service.context, tmp_path / "worker"):
        ended = wait_for(job, client)
    assert (ended.status, ended.error.code) == ("failed", "out_of_memory")
    assert "no worker has more than 0.00 GiB for it; lower method.rank" in ended.error.message


def test_a_request_for_a_base_that_fits_nowhere_is_told_why(service: Service) -> None:
    client = client_of(service)
    ask: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "red"}]}
    with pytest.raises(openai.InternalServerError, match="one has been asked for"):
        client.chat.completions.create(**ask)
    work = StoredWork(service.context.database, service.context.blobs)
    work.attend("here", [BASE], 30.0)
    work.note_room("here", HeldBase(BASE), Room(30 * GIB, 22 * GIB, 24 * GIB), 0)
    with pytest.raises(openai.InternalServerError, match=r"takes 30\.00 GiB, and no .* more than 22\.00") as told:
        client.chat.completions.create(**ask)
    assert told.value.status_code == 503


def test_a_worker_without_memory_for_what_it_is_asked_to_hold_says_so_and_ends(
    service: Service, tiny_llama: Path
) -> None:
    command = [sys.executable, "-m", "luthier.cli.main", "worker", "--base", f"{BASE}={tiny_llama}"]
    command += ["--data", str(service.context.settings.data_folder), "--place", "here", "--need", str(2**50)]
    StoredWork(service.context.database, service.context.blobs).attend("here", [BASE], 60.0)
    job = tune(client_of(service))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ), check=False)
    assert done.returncode == 2, done.stderr
    assert "needs 1048576.00 GiB beyond it" in done.stderr
    assert "Traceback" not in done.stderr
    assert client_of(service).fine_tuning.jobs.retrieve(job).status == "queued"
