"""`luthier serve` with nothing to configure, and the client's verbs against it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from running import BASE, chat_rows, wait_for
from typer.testing import CliRunner, Result

from luthier.cli.local_runs import local_run
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


def test_without_a_server_jobs_are_the_runs_here(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "state.json").write_text(json.dumps({"format": 1, "status": "done", "step": 7}))
    (run / "metrics.jsonl").write_text('{"kind": "step", "step": 7, "loss": 1.5}\n{"kind": "st')

    def here(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["jobs", *arguments])

    assert here("list", "--runs", str(tmp_path / "runs")).stdout.startswith(f"{run}  done")
    assert json.loads(here("show", str(run)).stdout)["step"] == 7
    assert here("watch", str(run)).stdout.strip() == str(run / "adapter")
    assert here("events", str(run)).stdout.strip() == "step 7  step  loss 1.5"
    for verb in ("cancel", "pause"):
        assert "nobody trains" in str(here(verb, str(run)).exception)
        assert "holds no run" in str(here(verb, str(tmp_path)).exception)
    assert "--server URL" in str(here("create", "x.jsonl").exception)


def test_a_run_here_is_paused_and_resumed(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(chat_rows(20))
    run = tmp_path / "run"
    recipe = {
        "base": str(tiny_llama),
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": None},
        "method": {"type": "lora", "rank": 2},
        "train": {"max_steps": 4000, "epochs": 4000.0, "batch_size": 4, "checkpoint_every": 10_000},
        "compute": {"device": "cpu", "threads": 1},
        "output": str(run),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "luthier.cli.main", "train", str(tmp_path / "recipe.yaml"), "-q"]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
            assert training.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        paused = CliRunner().invoke(app, ["jobs", "pause", str(run)])
        assert paused.stdout.strip() == "interrupted", paused
        assert training.wait(120) == 130
    finally:
        if training.poll() is None:
            training.kill()
            training.wait()
    step = local_run(run)["step"]
    assert step >= 3
    seen: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luthier.cli.jobs.train_command", lambda recipes, **values: seen.append({"r": recipes, **values}))
        assert CliRunner().invoke(app, ["jobs", "resume", str(run)]).exit_code == 0
    assert seen == [{"r": [str(run / "recipe.yaml")], "resume": True}]
