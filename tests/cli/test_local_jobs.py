"""`luthier jobs`, `files` and `models` without a server: the verbs speak of the runs and the files on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import chat_rows, wait_until
from typer.testing import CliRunner, Result

from luthier.cli.local_runs import local_run
from luthier.cli.main import app
from luthier.worker.run_folder import HOLDER_FILE, RunFolder
from luthier.worker.run_lock import trainer_of

SHORT: dict[str, Any] = {
    "method": {"type": "lora", "rank": 2},
    "train": {"max_steps": 3, "batch_size": 4, "max_length": 128},
    "evaluation": {"rows": 0},
    "compute": {"device": "cpu", "threads": 1},
}
LONG_STEPS = 4000


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with a training file; whatever still trains in it is ended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("luthier.cli.jobs.POLL_SECONDS", 0.02)
    Path("train.jsonl").write_bytes(chat_rows(20))
    yield tmp_path
    for state in tmp_path.glob("**/state.json"):
        if (trainer := trainer_of(state.parent)) is not None:
            os.kill(trainer.process, signal.SIGKILL)


@pytest.fixture
def recipe(tiny_llama: Path) -> Callable[..., str]:
    """Writes a recipe of a run that is long enough to be stopped in."""

    def write(**sections: Any) -> str:
        train = {"max_steps": LONG_STEPS, "epochs": 4000.0, "batch_size": 4, "checkpoint_every": 10_000}
        values = {**SHORT, "base": str(tiny_llama), "data": {"train": "train.jsonl", "validation": None}}
        values |= {"train": train, "output": "long", **sections}
        Path("recipe.yaml").write_text(json.dumps(values))
        return "recipe.yaml"

    return write


def luthier(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def said(*arguments: str) -> str:
    result = luthier(*arguments)
    assert result.exit_code == 0, result.exception
    return result.stdout.strip()


def test_a_data_file_becomes_a_run_a_model_and_what_others_go_on_from(tiny_llama: Path, here: Path) -> None:
    spec = json.dumps({**SHORT, "validation": 0.2})
    create = ("jobs", "create", "train.jsonl", "--spec", spec)
    run, model = said(*create, "--model", str(tiny_llama), "--seed", "7", "--watch").splitlines()
    assert (run, model) == ("runs/train", "runs/train/adapter")
    assert (here / model / "adapter_model.safetensors").exists()
    recipe = RunFolder(Path(run)).recipe()
    assert (recipe.train.seed, recipe.data.validation, recipe.method.type) == (7, 0.2, "lora")
    shown = json.loads(said("jobs", "show", run))
    assert (shown["status"], shown["step"], shown["total_steps"]) == ("done", 3, 3)
    assert (shown["model"], shown["fine_tuned_model"]) == (str(tiny_llama), model)
    assert "3 steps" in (here / run / "log.txt").read_text()
    assert said("jobs", "watch", run) == model
    assert f"{run}  {tiny_llama}  {model}" in said("models")
    assert json.loads(said("models", "--json"))[-1]["folder"] == model
    assert "is done" in str(luthier("jobs", "resume", run).exception)

    later = json.dumps({name: value for name, value in SHORT.items() if name != "method"})
    second = said("jobs", "create", "train.jsonl", "--model", run, "--suffix", "more", "--spec", later, "--watch")
    assert second.splitlines() == ["runs/train-more", "runs/train-more/adapter"]
    again = RunFolder(Path("runs/train-more")).recipe()
    assert (again.base, again.start_from, again.method) == (str(tiny_llama), run, recipe.method)
    assert said("jobs", "list").splitlines() == [
        "runs/train-more  done  runs/train-more/adapter",
        "runs/train  done  runs/train/adapter",
    ]
    (file,) = said("files", "list").splitlines()
    assert file.split() == ["train.jsonl", f"{len(chat_rows(20)):,}", "jsonl", "runs/train-more,", "runs/train"]


def test_a_run_in_the_background_is_paused_resumed_and_cancelled(recipe: Callable[..., str], here: Path) -> None:
    run = said("jobs", "create", recipe())
    assert run == "long"
    wait_until(lambda: local_run(Path(run))["step"] >= 3, 60)
    assert local_run(Path(run))["status"] == "training"
    assert local_run(Path(run))["total_steps"] == LONG_STEPS
    assert "is being trained already" in str(luthier("jobs", "resume", run).exception)
    assert "is being trained already" in str(luthier("jobs", "create", "recipe.yaml").exception)
    assert said("jobs", "pause", run) == "interrupted"
    assert trainer_of(Path(run)) is None
    paused = local_run(Path(run))["step"]
    assert "holds a run already" in str(luthier("jobs", "create", "recipe.yaml").exception)
    assert "it is interrupted" in str(luthier("jobs", "pause", run).exception)

    (here / "long").rename(here / "moved")
    assert said("jobs", "resume", "moved") in ("training", "preparing")
    wait_until(lambda: local_run(Path("moved"))["step"] > paused + 2, 60)
    assert said("jobs", "cancel", "moved") == "interrupted"
    steps = [line["step"] for line in map(json.loads, (here / "moved/metrics.jsonl").read_text().splitlines())]
    assert steps == list(range(1, len(steps) + 1)), "no step is missing, and none is there twice"
    assert not (here / "long").exists()
    assert said("jobs", "watch", "moved") == "interrupted"


def test_what_is_wrong_is_said_at_once_and_leaves_nothing(tiny_llama: Path, here: Path) -> None:
    Path("bad.jsonl").write_bytes(chat_rows(12) + b'{"messages": []}\n')
    create = ("jobs", "create", "bad.jsonl", "--model", str(tiny_llama), "--spec", json.dumps(SHORT))
    error = str(luthier(*create).exception)
    assert "bad.jsonl, line 13" in error
    assert "ended with code" not in error
    assert list((here / "runs").iterdir()) == []
    wrong = [
        (("none.jsonl",), "there is no data file"),
        (("train.jsonl", "--spec", '{"trian": {}}'), "trian is not a field"),
        (("train.jsonl", "--spec", "[]"), "an object"),
        (("train.jsonl", "--spec", "{"), "not valid JSON"),
        (("train.jsonl", "--spec", '{"train": 3}', "--seed", "1"), "a section"),
        (("train.jsonl", "--spec", '{"base": "x"}'), "--model"),
        (("train.jsonl", "--spec", '{"validation": 0.1}', "--validation", "train.jsonl"), "twice"),
        (("train.jsonl", "--suffix", "../x"), "without slashes"),
        (("train.jsonl", "--set", "train.epochs=x"), "train.epochs"),
    ]
    for arguments, says in wrong:
        result = luthier("jobs", "create", *arguments)
        assert result.exit_code == 1
        assert says in str(result.exception)
    assert list((here / "runs").iterdir()) == []


@pytest.mark.parametrize("option", ["--model", "--validation", "--suffix", "--seed", "--spec", "--runs"])
def test_a_recipe_takes_set_alone(option: str, recipe: Callable[..., str]) -> None:
    value = {"--seed": "1", "--spec": '{"task": "chat"}'}.get(option, "x")
    assert "use --set" in str(luthier("jobs", "create", recipe(), option, value).exception)


def test_a_run_that_was_killed_is_interrupted_and_watching_it_ends(recipe: Callable[..., str]) -> None:
    run = Path(said("jobs", "create", recipe(), "--set", "output=killed"))
    wait_until(lambda: local_run(run)["step"] >= 2, 60)
    trainer = trainer_of(run)
    assert trainer is not None
    os.kill(trainer.process, signal.SIGKILL)
    assert said("jobs", "watch", str(run)) == "interrupted"
    assert json.loads((run / "state.json").read_text())["status"] == "training"


def test_pausing_an_exclusive_run_ends_the_training_that_started_it(recipe: Callable[..., str]) -> None:
    """The process that holds such a run is a child of the one that was started."""
    command = [sys.executable, "-m", "luthier.cli.main", "train", recipe(method="full"), "-q"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as training:
        wait_until(lambda: Path("long/metrics.jsonl").exists(), 60)
        assert said("jobs", "pause", "long") == "interrupted"
        assert training.wait(30) == 130
        assert training.stderr is not None
        assert "Go on with" in training.stderr.read()


def test_a_run_is_told_from_its_folder(here: Path) -> None:
    run = here / "runs" / "first"
    run.mkdir(parents=True)
    (run / "state.json").write_text(json.dumps({"format": 1, "status": "done", "step": 7, "total_steps": 9}))
    (run / "metrics.jsonl").write_text('{"kind": "step", "step": 7, "loss": 1.5}\n{"kind": "st')
    assert said("jobs", "list") == "runs/first  done"
    assert said("jobs", "list", "--runs", str(here)) == ""
    assert json.loads(said("jobs", "show", "runs/first"))["loss"] == 1.5
    assert said("jobs", "events", "runs/first") == "step 7  step  loss 1.5"
    for verb in ("cancel", "pause"):
        assert "nobody trains runs/first: it is done" in str(luthier("jobs", verb, "runs/first").exception)
        assert "holds no run" in str(luthier("jobs", verb, ".").exception)
    (run / "state.json").write_text(json.dumps({"format": 1, "status": "failed", "problem": "it blew up"}))
    assert "it blew up" in str(luthier("jobs", "watch", "runs/first").exception)
    (run / "state.json").write_text(json.dumps({"format": 1, "status": "preparing"}))
    (run / "log.txt").write_text("Starting\nerror: an old one\nStarting\nerror: no base\n  to fix:   fetch it\n")
    assert str(luthier("jobs", "watch", "runs/first").exception) == (
        "runs/first has not begun: no base\n  to fix:   fetch it"
    )


def test_who_trains_a_run_is_told_by_more_than_a_number(here: Path) -> None:
    (here / "state.json").write_text('{"format": 1, "status": "training"}')
    noted = {"process": os.getpid(), "host": socket.gethostname(), "since": "now"}
    (here / HOLDER_FILE).write_text(json.dumps(noted))
    assert local_run(here)["status"] == "training"
    long_ago = time.time() - 10 * 365 * 86_400  # before this process began: another had its number
    os.utime(here / HOLDER_FILE, (long_ago, long_ago))
    assert local_run(here)["status"] == "interrupted"
    (here / HOLDER_FILE).write_text(json.dumps(noted | {"host": "elsewhere"}))
    assert local_run(here)["status"] == "interrupted", "nobody holds its lock"


def test_files_here_are_read_and_listed_and_stay(here: Path) -> None:
    assert said("files", "upload", "train.jsonl") == "train.jsonl"
    (here / "data").mkdir()
    Path("data/table.csv").write_text("text,label\na,b\n")
    Path("data/notes.md").write_text("no data")
    listed = json.loads(said("files", "list", "--folder", "data", "--json"))
    assert [(row["id"], row["kind"], row["runs"]) for row in listed] == [("data/table.csv", "csv", [])]
    assert "no folder" in str(luthier("files", "list", "--folder", "train.jsonl").exception)
    Path("broken.jsonl").write_text('{"a": 1}\n{"a": \n')
    error = str(luthier("files", "upload", "broken.jsonl").exception)
    assert "broken.jsonl, line 2" in error
    assert "luthier check broken.jsonl" in error
    assert "--server" in str(luthier("files", "upload", "train.jsonl", "--purpose", "batch").exception)
    assert "of this machine already" in str(luthier("files", "get", "train.jsonl", "--to", "x").exception)
    assert "delete it yourself" in str(luthier("files", "delete", "train.jsonl").exception)
    assert Path("train.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("jobs", "list", "--runs", "x"), "--runs"),
        (("jobs", "create", "train.jsonl", "--set", "train.epochs=1"), "--set"),
        (("jobs", "create", "train.jsonl", "--runs", "x"), "--runs"),
        (("jobs", "create", "recipe.yaml"), "--spec"),
        (("files", "list", "--folder", "x"), "--folder"),
        (("models", "--fetch", "x"), "--fetch"),
        (("models", "--runs", "x"), "--runs"),
    ],
    ids=str,
)
def test_what_speaks_of_this_machine_goes_to_no_server(arguments: tuple[str, ...], says: str) -> None:
    result = luthier("--server", "http://127.0.0.1:9", "--key", "sk-x", *arguments)
    assert says in str(result.exception)
    assert "does not answer" not in str(result.exception)
