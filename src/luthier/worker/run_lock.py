"""One process at a time trains a run folder: a lock on it that the system drops with the process, however that ends.

Who holds the lock stands in a file beside it, so that others can say who it is, and ask it to stop.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from luthier.errors import RunError, StorageError
from luthier.files import write_text
from luthier.worker.run_folder import HOLDER_FILE, LOCK_FILE, RunFolder

CLOCK_SECONDS = 2.0
"""How far the system's account of when a process began may be off."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """The process that trains a run folder, or was started to.

    Attributes:
        process: Its id on `host`.
        since: When it took the folder, in words.
    """

    process: int
    host: str
    since: str

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}"


def trainer_of(folder: Path) -> Trainer | None:
    """Who trains a run folder now; None where nobody does. It takes no lock of a run here, and is in nobody's way."""
    noted = _noted(folder)
    if noted is None:
        return None
    trainer, noted_at = noted
    if trainer.is_here:
        return trainer if _is_alive(trainer.process, noted_at) else None
    return trainer if _is_locked(folder) else None


def note_trainer(folder: Path, process: int) -> None:
    """Say that a process of this machine trains a folder, or will as soon as it has started."""
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"process": process, "host": socket.gethostname(), "since": started}
    # Beside the lock's file, for who tries to take that empties it.
    write_text(folder / HOLDER_FILE, json.dumps(holder) + "\n")


@contextmanager
def holding(outputs: Sequence[str]) -> Iterator[None]:
    """Hold the run folders while the block runs; each is made if it is not there.

    A folder that holds something else than a run is left as it is: `RunFolder.create` refuses it.

    Raises:
        RunError: where another process, or another training in this one, holds one of them; it is named.
        StorageError: where a folder cannot be made, or its disk knows no locks.
    """
    with ExitStack() as held:
        for output in outputs:
            folder = Path(output)
            if _may_be_a_run(folder):
                held.enter_context(_hold(folder))
        yield


def _may_be_a_run(folder: Path) -> bool:
    if not folder.exists():
        return True
    return folder.is_dir() and (RunFolder(folder).has_state or RunFolder(folder).is_empty)


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE, timeout=0)
        lock.acquire()
    except Timeout:
        raise RunError(
            f"{folder} is being trained already, by {_holder(folder)}",
            "one process at a time",
            "wait until it ends or stop it, or choose another folder with --set output=...",
        ) from None
    except (OSError, NotImplementedError) as error:
        raise StorageError(
            f"{folder} cannot be made or locked: {error}", fix="choose another folder for `output`"
        ) from None
    try:
        note_trainer(folder, os.getpid())
        yield
    finally:
        (folder / HOLDER_FILE).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    noted = _noted(folder)
    return str(noted[0]) if noted is not None else "a process that has not said its name yet"


def _noted(folder: Path) -> tuple[Trainer, float] | None:
    """Who is noted as the folder's trainer, and when that was written, in seconds since 1970."""
    path = folder / HOLDER_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        trainer = Trainer(int(values["process"]), str(values["host"]), str(values["since"]))
        return trainer, path.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_alive(process: int, noted_at: float) -> bool:
    """Whether the process is the one that was noted then, rather than a later one with its number."""
    try:
        found = psutil.Process(process)
        return found.status() != psutil.STATUS_ZOMBIE and found.create_time() <= noted_at + CLOCK_SECONDS
    except psutil.Error:
        return False


def _is_locked(folder: Path) -> bool:
    if not (folder / LOCK_FILE).exists():
        return False
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False
