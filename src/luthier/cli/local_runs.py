"""`luthier jobs` without a server: the runs on this machine, from what stands in their folders."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from luthier.errors import RunError

RUN_ENDS = ("done", "failed", "interrupted")
LOCK_FILE, HOLDER_FILE = ".lock", ".holder.json"
STOP_SECONDS = 120.0
POLL_SECONDS = 0.1


def local_runs(folder: Path) -> Iterator[dict[str, Any]]:
    """The runs in a folder, the one that changed last first."""
    found = sorted(folder.glob("*/state.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        yield local_run(path.parent)


def local_run(folder: Path) -> dict[str, Any]:
    """A run folder's state and its last step.

    Raises:
        RunError: where there is no run.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(f"{folder} holds no run", "a folder that `luthier train` wrote") from None
    step = int(state.get("step") or 0)
    for line in reversed(_metrics(folder)):
        if "step" in line:
            step = max(step, int(line["step"]))
            break
    return {"id": str(folder), **state, "step": step}


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
    local_run(folder)
    if not is_held(folder):
        raise RunError(f"nobody trains {folder}", fix=f"look at it with `luthier jobs show {folder}`")
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        process, host = int(holder["process"]), str(holder["host"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{folder} does not say which process trains it", fix="try again in a moment") from None
    if host != socket.gethostname():
        raise RunError(f"{folder} is trained on {host}", f"this machine, {socket.gethostname()}", f"stop it on {host}")
    try:
        os.kill(process, signal.SIGTERM)
    except (ProcessLookupError, PermissionError) as error:
        raise RunError(f"the process {process} that trains {folder} cannot be asked: {error.strerror}") from None
    deadline = time.monotonic() + STOP_SECONDS
    while is_held(folder):
        if time.monotonic() > deadline:
            raise RunError(f"the process {process} still trains {folder}", fix="look at it, or wait")
        time.sleep(POLL_SECONDS)
    return str(local_run(folder)["status"])


def is_held(folder: Path) -> bool:
    """Whether some process trains the run now."""
    if not (folder / LOCK_FILE).exists():
        return False
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False


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
