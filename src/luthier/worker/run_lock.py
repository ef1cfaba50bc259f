"""One process at a time trains a run folder: a lock on it that the system drops with the process, however that ends."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from luthier.errors import RunError, StorageError
from luthier.files import write_text
from luthier.worker.run_folder import HOLDER_FILE, LOCK_FILE, RunFolder


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
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": started}
        # Beside the lock's file, for who tries to take that empties it.
        write_text(folder / HOLDER_FILE, json.dumps(holder) + "\n")
        yield
    finally:
        (folder / HOLDER_FILE).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said its name yet"
