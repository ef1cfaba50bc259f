"""Runs in the background: each is a `luthier train` that needs no terminal and writes what it says into its run folder.

A start is done once the run's data has been checked: until then whatever is wrong is the caller's to hear, later it
stands in the run's state and in its log. Importing this module does not import torch.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from luthier.errors import RunError, StorageError
from luthier.recipe import Recipe
from luthier.worker.run_folder import LOG_FILE, RunFolder
from luthier.worker.run_lock import holding, note_trainer, trainer_of

POLL_SECONDS = 0.05
INTERRUPTED_CODE = 130
NUM_LAST_LINES = 3

_ERROR = re.compile(r"^error: (.*)\Z", re.MULTILINE | re.DOTALL)


def start_run(recipe: Recipe) -> RunFolder:
    """Begin a recipe's run in a process of its own, and return once its data holds.

    Raises:
        RunError: where its folder is taken, or with the process's own words where it ended before that; then nothing
            is left.
        StorageError: where the folder cannot be written.
        KeyboardInterrupt: after Ctrl-C, once the process is gone.
    """
    with holding([recipe.output]):
        run = RunFolder.create(recipe)
        (run.path / LOG_FILE).unlink(missing_ok=True)
    try:
        _launch(run)
    except BaseException:
        if run.is_unused and trainer_of(run.path) is None:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def resume_run(folder: Path) -> RunFolder:
    """Go on with a run from its last checkpoint, in a process of its own; returns once it is under way.

    Raises:
        RunError: where there is none, it is done or somebody trains it, or with the process's own words where it ended.
        KeyboardInterrupt: after Ctrl-C, once the process is gone.
    """
    run = RunFolder.open(folder)
    if (trainer := trainer_of(folder)) is not None:
        raise RunError(f"{folder} is being trained already, by {trainer}")
    if run.state()["status"] == "done":
        raise RunError(f"{folder} is done", "a run that was interrupted", "start a new one; it can go on from this one")
    _launch(run)
    return run


def error_of(run: RunFolder, after: int = 0) -> str:
    """The error with which a run in the background ended, as its log has it; empty where there is none.

    Args:
        after: Characters of the log that an earlier process wrote.
    """
    text = _log_of(run)[after:].rstrip()
    found = _ERROR.search(text, text.rfind("\nerror: ") + 1)
    return found[1] if found else ""


def _launch(run: RunFolder) -> None:
    """Start the process and wait until it has checked the data, which is later than all that is refused."""
    seen = _written_at(run.path / "data.json")
    log = run.path / LOG_FILE
    before = len(_log_of(run))
    # Where the folder is now: it may have been moved since its recipe was written.
    options = ["--set", f"output={json.dumps(str(run.path))}", "--resume"]
    command = [sys.executable, "-m", "luthier.cli.main", "train", str(run.path / "recipe.yaml"), *options]
    try:
        with log.open("ab") as out:
            # In a session of its own, so that neither Ctrl-C nor the end of the terminal reaches it.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
    except OSError as error:
        raise StorageError(
            f"{log} cannot be written: {error}", fix="free some space, or choose another folder"
        ) from None
    note_trainer(run.path, process.pid)
    try:
        while _written_at(run.path / "data.json") == seen:
            if process.poll() is not None:
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if process.returncode not in (None, 0, INTERRUPTED_CODE):
        words = " ".join(_log_of(run)[before:].splitlines()[-NUM_LAST_LINES:])
        raise RunError(
            error_of(run, before) or f"the process of {run.path} ended with code {process.returncode}; it said: {words}"
        )


def _log_of(run: RunFolder) -> str:
    try:
        return (run.path / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _written_at(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
