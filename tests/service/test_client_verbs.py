"""The client's verbs with --server: jobs, files and models, from upload to the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from running import BASE, Service, chat_rows
from typer.testing import CliRunner, Result

from luthier.cli.main import app

Run = Callable[..., Result]
SMALL = json.dumps({"train": {"max_steps": 2, "checkpoint_every": 1}, "method": {"type": "lora", "rank": 2}})
LONG = json.dumps({"train": {"epochs": 2000.0}})


@pytest.fixture
def run(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_SERVER", service.url)
    monkeypatch.setenv("LUTHIER_API_KEY", service.keys["acme"])
    Path("train.jsonl").write_bytes(chat_rows(12))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    return run


def said(result: Result) -> str:
    assert result.exit_code == 0, result.exception
    return result.stdout.strip()


def test_a_job_from_upload_to_its_model(run: Run) -> None:
    file = said(run("files", "upload", "train.jsonl"))
    assert f"{file}  " in said(run("files", "list"))
    assert said(run("files", "get", file, "--to", "again.jsonl")) == "again.jsonl"
    assert Path("again.jsonl").read_bytes() == chat_rows(12)
    job = said(run("jobs", "create", file, "--model", BASE, "--suffix", "cli", "--seed", "3", "--spec", SMALL))
    model = said(run("jobs", "watch", job))
    assert model.startswith(f"ft:{BASE}:acme:cli:")
    shown = json.loads(said(run("jobs", "show", job)))
    assert (shown["status"], shown["seed"], shown["fine_tuned_model"]) == ("succeeded", 3, model)
    events = said(run("jobs", "events", job)).splitlines()
    assert events[0].endswith(f"Created fine-tuning job: {job}")
    assert events[-1].endswith("The job has successfully completed")
    assert f"{job}  succeeded  {model}" in said(run("jobs", "list"))
    assert model in said(run("models"))
    assert said(run("files", "delete", file)) == f"{file} is deleted."
    assert file not in said(run("files", "list"))


def test_a_job_is_paused_resumed_and_ended(run: Run) -> None:
    job = said(run("jobs", "create", "train.jsonl", "--model", BASE, "--spec", LONG))
    assert said(run("jobs", "pause", job)) == "paused"
    assert said(run("jobs", "resume", job)) == "queued"
    assert said(run("jobs", "cancel", job)) == "cancelled"
    assert said(run("jobs", "watch", job)) == "cancelled"
    assert "cancelled already" in str(run("jobs", "cancel", job).exception)


def test_what_a_server_refuses_is_said_in_its_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bad.jsonl").write_bytes(b'{"messages": []}\n' * 12)
    assert "bad.jsonl, line 1" in str(run("jobs", "create", "bad.jsonl", "--model", BASE).exception)
    assert "No such fine-tuning job" in str(run("jobs", "show", "ftjob-none").exception)
    monkeypatch.setenv("LUTHIER_API_KEY", "sk-wrong")
    assert "Incorrect API key" in str(run("jobs", "list").exception)
    monkeypatch.setenv("LUTHIER_SERVER", "http://127.0.0.1:9")
    assert "does not answer" in str(run("jobs", "list").exception)
