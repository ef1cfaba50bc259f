"""kill -9 of workers and APIs while jobs run: every job succeeds, and nothing is lost or doubled.

LUTHIER_TEST_KILLS sets how many, as in "10,5" (workers, APIs) or "10,5,20" (and jobs); the default is short.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from processes import free_port
from running import BASE, chat_rows, make_context, serving, wait_for, working
from safetensors.numpy import load

from luthier.store.blobs import Blobs
from luthier.store.database import open_database
from luthier.store.tables import Event, Model, Usage

NUM_WORKER_KILLS, NUM_API_KILLS, NUM_JOBS = (
    int(n) for n in (os.environ.get("LUTHIER_TEST_KILLS", "1,1") + ",4").split(",")[:3]
)
# Long enough that the last kill still finds jobs at work: while an API starts again, the worker goes on.
NUM_EPOCHS = 6.0 + NUM_WORKER_KILLS + 8 * NUM_API_KILLS
OWN: dict[str, Any] = {
    "method": {"type": "lora", "rank": 2},
    "train": {"epochs": NUM_EPOCHS, "batch_size": 4, "checkpoint_every": 7},
    "validation": 0.2,
}


class Process:
    """One of the service's processes, started and killed at will."""

    def __init__(self, verb: str, folder: Path, base: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "luthier.cli.main", verb, "--data", str(folder), "--base", f"{BASE}={base}"]
        environment = os.environ | {"LUTHIER_LEASE_SECONDS": "2", "OMP_NUM_THREADS": "1"}
        self._log = (folder / f"{verb}.log").open("ab")
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=self._log, stderr=self._log, env=environment, start_new_session=True
        )

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._log.close()
        return code


def create_jobs(client: openai.OpenAI) -> list[str]:
    made = []
    for seed in range(NUM_JOBS):
        file = client.files.create(file=("t.jsonl", chat_rows(40, seed)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, seed=seed, extra_body={"luthier": OWN})
        made.append(job.id)
    return made


def adapter(blobs: Blobs, model: Model) -> dict[str, Any]:
    return load(b"".join(blobs.pieces(f"{model.blob}/adapter_model.safetensors")))


@contextmanager
def running(folder: Path, base: Path) -> Iterator[dict[str, Process]]:
    port = free_port()
    processes = {"serve": start_api(folder, base, port), "worker": start_worker(folder, base)}
    try:
        yield processes
    finally:
        for process in processes.values():
            if process.process.poll() is None:
                process.kill(signal.SIGTERM)


def start_api(folder: Path, base: Path, port: int) -> Process:
    process = Process("serve", folder, base, "--no-workers", "--port", str(port))
    for _ in range(600):
        try:
            httpx.get(f"http://127.0.0.1:{port}/healthz")
        except httpx.HTTPError:
            assert process.process.poll() is None, (folder / "serve.log").read_text()
            time.sleep(0.1)
        else:
            process.port = port  # type: ignore[attr-defined]
            return process
    process.kill()
    raise AssertionError("the API does not start")


def start_worker(folder: Path, base: Path) -> Process:
    return Process("worker", folder, base, "--threads", "1")


@pytest.mark.timeout(3000)
def test_jobs_survive_kills(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    draw = random.Random(1)
    with running(folder, tiny_llama) as processes:
        port = processes["serve"].port  # type: ignore[attr-defined]
        database = open_database(f"sqlite:///{folder / 'luthier.db'}")
        context_key = _key(folder)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=context_key, max_retries=5)
        jobs = create_jobs(client)
        kills = ["worker"] * NUM_WORKER_KILLS + ["serve"] * NUM_API_KILLS
        draw.shuffle(kills)
        num_steps = 0
        for what in kills:
            num_steps = wait_until_they_go_on(client, jobs, num_steps)
            time.sleep(draw.uniform(0.0, 1.5))
            processes[what].kill()
            if what == "worker":
                processes["worker"] = start_worker(folder, tiny_llama)
            else:
                processes["serve"] = start_api(folder, tiny_llama, port)
        done = [wait_for(job, client, seconds=1200) for job in jobs]
        assert processes["worker"].kill(signal.SIGTERM) == 0, "a worker ends well when it is asked to"
    assert [job.status for job in done] == ["succeeded"] * NUM_JOBS, [job.error for job in done]
    check_events_and_usage(database, jobs)
    blobs = Blobs(str(folder / "blobs"))
    killed = models_by_seed(database)
    calm_database, calm_blobs = undisturbed(tiny_llama, tmp_path / "calm")
    calm = models_by_seed(calm_database)
    for seed in range(NUM_JOBS):
        left, right = adapter(blobs, killed[seed]), adapter(calm_blobs, calm[seed])
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert value == pytest.approx(right[name], rel=1e-3, abs=2e-4), f"{seed} {name}"


def check_events_and_usage(database: Any, jobs: list[str]) -> None:
    """No step's event is lost or doubled, and each step is billed once."""
    with database.reading() as session:
        for job in jobs:
            steps = sorted(
                e.data["step"] for e in session.query(Event).where(Event.job == job, Event.type == "metrics")
            )
            assert steps == list(range(1, steps[-1] + 1))
            billed = sorted(u.step for u in session.query(Usage).where(Usage.source == job))
            assert billed == steps
            keys = [e.key for e in session.query(Event).where(Event.job == job)]
            assert {"created", "started", "succeeded", "model"} <= set(keys)
            assert len(keys) == len(set(keys))


def models_by_seed(database: Any) -> dict[int, Model]:
    from luthier.store.tables import Job

    with database.reading() as session:
        return {job.seed: model for job, model in session.query(Job, Model).join(Model, Model.job == Job.id)}


def undisturbed(base: Path, folder: Path) -> tuple[Any, Blobs]:
    context = make_context(folder, base)
    with serving(context) as service, working(context, folder / "worker"):
        key = service.tenant("default")
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=key)
        for job in create_jobs(client):
            wait_for(job, client, seconds=1200)
    return open_database(context.settings.database_url), context.blobs


def wait_until_they_go_on(client: openai.OpenAI, jobs: list[str], num_steps: int) -> int:
    """Wait until the jobs have done more steps together than `num_steps`; returns how many."""
    for _ in range(1200):
        found = [job for job in client.fine_tuning.jobs.list(limit=100).data if job.id in jobs]
        assert any(job.status not in ("succeeded", "failed") for job in found), "they were done before the last kill"
        now: int = sum(job.to_dict()["luthier"]["step"] for job in found)  # type: ignore[index, call-overload, misc]
        if now > num_steps:
            return now
        time.sleep(0.1)
    raise AssertionError("no job goes on")


def _key(folder: Path) -> str:
    for _ in range(600):
        for line in (folder / "serve.log").read_text().splitlines():
            if line.startswith("First key"):
                return line.rsplit(" ", 1)[1]
        time.sleep(0.1)
    raise AssertionError((folder / "serve.log").read_text())
