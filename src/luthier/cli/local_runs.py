"""The runs on this machine as `luthier jobs` speaks of them without a server, from what stands in their folders."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from luthier.base.folder import RESULT_MODEL
from luthier.errors import RunError
from luthier.worker.background import error_of
from luthier.worker.run_folder import RunFolder
from luthier.worker.run_lock import trainer_of

RUNS = "runs"
"""Where run folders are, unless the user says otherwise."""
RUN_ENDS = ("done", "failed", "interrupted")
STOP_SECONDS = 120.0
POLL_SECONDS = 0.1


def local_runs(folder: Path) -> Iterator[dict[str, Any]]:
    """The runs in a folder, the one that changed last first; those that cannot be read are left out."""
    found = sorted(folder.glob("*/state.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        try:
            yield described_run(path.parent)
        except RunError:
            continue


def local_run(folder: Path) -> dict[str, Any]:
    """How far a run is: its state, its last step and loss. One whose process is gone is interrupted.

    Raises:
        RunError: where there is no run.
    """
    run = RunFolder(folder)
    if not run.has_state:
        raise RunError(f"{folder} holds no run", "a folder that `luthier train` wrote")
    trainer = trainer_of(folder)  # asked first, so that what it wrote at its end is not missed
    state = run.state()
    status = str(state["status"])
    if trainer is None:
        status = status if status in RUN_ENDS else "interrupted"
    elif status in RUN_ENDS:  # its report is being written; or an earlier end still stands there, and it goes on
        status = "finishing" if status == "done" else "preparing"
    step, loss = int(state.get("step") or 0), None
    for line in reversed(_metrics(folder)):
        if line.get("kind") == "step" and "step" in line:
            step, loss = max(step, int(line["step"])), line.get("loss")
            break
    if status == "interrupted" and state["status"] == "preparing" and (words := error_of(run)):
        state["problem"] = words
    return {"id": str(folder), **state, "status": status, "step": step, "loss": loss}


def described_run(folder: Path) -> dict[str, Any]:
    """A run with its base, and where its model lies once it is done; errors as `local_run`."""
    run = local_run(folder)
    values = recipe_values(folder)
    tuned = tuned_folder(folder) if run["status"] == "done" else None
    return {**run, "model": values.get("base"), "fine_tuned_model": str(tuned) if tuned is not None else None}


def tuned_folder(folder: Path) -> Path | None:
    """Where a run's result lies: a whole model or an adapter; None where it has none yet."""
    return next((path for path in (folder / RESULT_MODEL, folder / "adapter") if path.exists()), None)


def recipe_values(folder: Path) -> dict[str, Any]:
    """A run's recipe as plain values; empty where it cannot be read."""
    try:
        values = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def files_of(folder: Path) -> list[str]:
    """The data files that a run's recipe names."""
    data = recipe_values(folder).get("data") or {}
    train, validation = data.get("train") or [], data.get("validation")
    return [*([train] if isinstance(train, str) else train), *([validation] if isinstance(validation, str) else [])]


def local_events(folder: Path, limit: int) -> list[str]:
    """The last of what metrics.jsonl tells, oldest first, as a person reads it."""
    local_run(folder)
    told = []
    for line in _metrics(folder)[-limit:]:
        figures = [
            f"{name} {value:.4g}"
            for name, value in line.items()
            if isinstance(value, int | float) and name in ("loss", "learning_rate", "perplexity", "tokens_per_second")
        ]
        told.append(f"step {line.get('step')}  {line.get('kind', '')}  {', '.join(figures)}")
    return told


def stop_run(folder: Path) -> str:
    """Let the process that trains a run save it and end, with all other runs that it trains; returns the run's status.

    Raises:
        RunError: where nobody trains it here, or the process does not end in time.
    """
    run, trainer = local_run(folder), trainer_of(folder)
    if trainer is None:
        raise RunError(f"nobody trains {folder}: it is {run['status']}")
    if not trainer.is_here:
        raise RunError(f"{folder} is trained by {trainer}", "a run of this machine", f"stop it on {trainer.host}")
    try:
        os.kill(trainer.process, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it ended in between
    except PermissionError as error:
        raise RunError(f"{trainer} trains {folder}, and cannot be asked: {error.strerror}") from None
    deadline = time.monotonic() + STOP_SECONDS
    while trainer_of(folder) is not None:
        if time.monotonic() > deadline:
            raise RunError(f"{trainer} still trains {folder}", fix="look at it, or wait")
        time.sleep(POLL_SECONDS)
    return str(local_run(folder)["status"])


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue  # the line that is being written
    return [line for line in found if isinstance(line, dict)]
