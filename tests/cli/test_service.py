"""`luthier serve` with nothing to configure, and the client's verbs against it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
from running import BASE, chat_rows, wait_for
from typer.testing import CliRunner

from luthier.cli.main import app


def luthier(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "luthier.cli.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False
    )


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


def test_verbs_on_the_store(tmp_path: Path) -> None:
    data, again = ("--data", str(tmp_path / "data")), ("--data", str(tmp_path / "again"))

    def say(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result
        return result.stdout

    assert say("tenants", "create", "acme", "--weight", "2", *data).startswith("org-")
    say("tenants", "update", "acme", "--weight", "3", *data)
    assert "weight 3" in say("tenants", "list", *data)
    key, text = say("keys", "create", "acme", "--scope", "infer", *data).split()
    assert text.startswith("sk-")
    listed = say("keys", "list", "acme", *data)
    assert key in listed
    assert text not in listed
    assert say("keys", "rotate", key, *data)
    assert "revoked" in say("keys", "list", "acme", *data)
    assert "already" in str(CliRunner().invoke(app, ["tenants", "create", "acme", *data]).exception)
    assert say("backup", str(tmp_path / "copy"), *data).endswith("holds the database and 0 blobs.\n")
    say("restore", str(tmp_path / "copy"), *again)
    assert say("keys", "list", "acme", *again) == say("keys", "list", "acme", *data)
    say("tenants", "erase", "acme", "--yes", *data)
    assert say("tenants", "list", *data) == ""
