"""Starts a worker process for each base that somebody waits for. Importing this module does not import torch."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from luthier.base.catalogue import find
from luthier.base.folder import weight_files
from luthier.errors import ModelError
from luthier.registry.seam import WorkRecord
from luthier.store.held_base import HeldBase

logger = logging.getLogger("luthier.worker")

POLL_SECONDS = 0.5
STOP_SECONDS = 75.0
MAX_WAIT_SECONDS = 60.0
MEMORY_PER_WEIGHT_BYTE = 1.3
"""A loaded base takes its weights and some room to work."""
NF4_SHARE = 0.4
"""Of the bytes in float32, what a base in NF4 takes: its embeddings stay as they are."""


class Supervisor:
    """Watches what is wanted, and keeps a process for it on this machine as long as it is.

    Args:
        record: Where it is found what is wanted.
        sources: Base's name -> what it stands for; a base that is not named here is left to other machines.
        arguments: Further arguments for `luthier worker`.
    """

    def __init__(self, record: WorkRecord, sources: dict[str, str], arguments: Sequence[str] = ()) -> None:
        self._record = record
        self._sources = sources
        self._arguments = list(arguments)
        self._processes: dict[HeldBase, subprocess.Popen[bytes]] = {}
        self._not_before: dict[HeldBase, float] = {}
        self._num_failures: dict[HeldBase, int] = {}
        self._is_stopping = threading.Event()

    def run(self) -> None:
        """Watch until `stop`; then let every worker save its jobs and end."""
        try:
            while not self._is_stopping.wait(POLL_SECONDS):
                try:
                    self._look()
                except Exception:
                    logger.exception("the store does not answer the supervisor; trying again")
        finally:
            self._end_all()

    def stop(self) -> None:
        self._is_stopping.set()

    def _look(self) -> None:
        self._bury()
        for base in self._record.wanted_bases():
            is_due = time.monotonic() >= self._not_before.get(base, 0.0)
            if base.name in self._sources and base not in self._processes and is_due and self._has_room(base):
                self._processes[base] = self._start(base)

    def _bury(self) -> None:
        """Forget workers that have ended; one that failed waits longer each time before it is started again."""
        for base, process in list(self._processes.items()):
            if process.poll() is None:
                continue
            del self._processes[base]
            failed = process.returncode != 0
            self._num_failures[base] = self._num_failures.get(base, 0) + 1 if failed else 0
            if failed:
                wait = min(MAX_WAIT_SECONDS, 2.0 ** self._num_failures[base] / 2)
                self._not_before[base] = time.monotonic() + wait
                logger.warning(
                    "a worker died", extra={"base": str(base), "code": process.returncode, "wait_seconds": wait}
                )

    def _has_room(self, base: HeldBase) -> bool:
        num_bytes = _float32_bytes(self._sources[base.name])
        needed = num_bytes * MEMORY_PER_WEIGHT_BYTE * (NF4_SHARE if base.quantization else 1.0)
        if psutil.virtual_memory().available >= needed:
            return True
        self._not_before[base] = time.monotonic() + MAX_WAIT_SECONDS
        logger.warning("too little memory for a base", extra={"base": str(base), "needed_bytes": int(needed)})
        return False

    def _start(self, base: HeldBase) -> subprocess.Popen[bytes]:
        source = self._sources[base.name]
        named = base.name if source == base.name else f"{base.name}={source}"
        command = [sys.executable, "-m", "luthier.cli.main", "worker", "--base", named, *self._arguments]
        command += ["--quantization", base.quantization] if base.quantization else []
        command += ["--weights", base.weights] if base.weights else []
        logger.info("starting a worker", extra={"base": str(base)})
        # In a group of its own, so that a Ctrl-C in the terminal reaches it once, through us.
        return subprocess.Popen(command, start_new_session=True)

    def _end_all(self) -> None:
        for process in self._processes.values():
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def _float32_bytes(source: str) -> int:
    """What a base takes in float32; 0 where it is not known before it is fetched."""
    entry = find(source)
    if entry is not None:
        return entry.float32_bytes
    try:
        return sum(path.stat().st_size for path in weight_files(Path(source)))
    except (ModelError, OSError):
        return 0
