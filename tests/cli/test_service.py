"""`luthier serve` with nothing to configure, and the client's verbs against it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from running import BASE, chat_rows, wait_for

from luthier.cli.main import main


def luthier(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "luthier.cli.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False
    )


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process, by the function that it calls."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["luthier", *arguments])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, printed.out, printed.err)

    return run


@pytest.mark.timeout(300)
def test_serve_needs_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    """The issue's own lines: start, upload, tune, chat; then the command line; then a clean end."""
    data = tmp_path / "data"
    command = [sys.executable, "-m", "luthier.cli.main", "serve", "--port", "0", "--data", str(data)]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--base", f"{BASE}={tiny_llama}"], stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        key = server.stdout.readline().split()[-1]
        client = openai.OpenAI(base_url=url, api_key=key)
        train = tmp_path / "train.jsonl"
        train.write_bytes(chat_rows(20))
        with train.open("rb") as stream:
            file = client.files.create(file=stream, purpose="fine-tune")
        own: dict[str, Any] = {"task": "chat", "method": {"type": "lora", "rank": 4}, "train": {"max_steps": 3}}
        job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, extra_body={"luthier": own})
        done = wait_for(job.id, client, seconds=120)
        assert done.status == "succeeded", done.error
        stream = client.chat.completions.create(
            model=str(done.fine_tuned_model), messages=[{"role": "user", "content": "red"}], stream=True, max_tokens=5
        )
        assert list(stream)[-1].choices[0].finish_reason
        root = ("--server", url, "--key", key)
        made = luthier(*root, "jobs", "create", str(train), "--model", BASE, "--spec", json.dumps(own), "--watch")
        assert made.returncode == 0, made.stderr
        assert made.stdout.splitlines()[1].startswith(f"ft:{BASE}:default:")
        listed = luthier(*root, "jobs", "list", "--json")
        assert [row["id"] for row in json.loads(listed.stdout)] == [made.stdout.splitlines()[0], job.id]
        assert made.stdout.splitlines()[1] in luthier(*root, "models").stdout
        refused = luthier(*root, "jobs", "cancel", job.id)
        assert refused.returncode == 2
        assert "succeeded already" in refused.stderr
        usage = luthier("usage", "default", "--json", "--data", str(data))
        assert sum(row["trained_tokens"] for row in json.loads(usage.stdout)) > 0
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(100) == 0
    log_lines = (tmp_path / "log").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in log_lines if line.startswith("{"))
    assert key not in "\n".join(log_lines)


def test_verbs_on_the_store(tmp_path: Path, here: Run) -> None:
    data = ("--data", str(tmp_path / "data"))
    assert here("tenants", "create", "acme", "--weight", "2", *data).stdout.startswith("org-")
    made = here("keys", "create", "acme", "--scope", "infer", *data).stdout.split()
    assert made[1].startswith("sk-")
    listed = here("keys", "list", "acme", *data).stdout
    assert made[0] in listed
    assert made[1] not in listed
    assert here("keys", "rotate", made[0], *data).returncode == 0
    assert "revoked" in here("keys", "list", "acme", *data).stdout
    assert here("tenants", "create", "acme", *data).returncode == 2
    assert here("tenants", "erase", "acme", "--yes", *data).returncode == 0
    assert here("tenants", "list", *data).stdout == ""


def test_without_a_server_jobs_are_the_runs_here(tmp_path: Path, here: Run) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "state.json").write_text(json.dumps({"format": 1, "status": "done", "step": 7}))
    listed = here("jobs", "list", "--runs", str(tmp_path / "runs"))
    assert listed.stdout.startswith(f"{run}  done")
    assert here("jobs", "watch", str(run)).stdout.strip() == str(run / "adapter")
    for verb in ("cancel", "pause"):
        refused = here("jobs", verb, "x")
        assert refused.returncode == 2
        assert "--server" in refused.stderr
