"""Starts a worker process for each base that somebody waits for. Importing this module does not import torch."""

from __future__ import annotations

import logging
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from luthier.errors import LuthierError
from luthier.registry.seam import WantedBase, WorkRecord
from luthier.store.held_base import HeldBase

logger = logging.getLogger("luthier.worker")

POLL_SECONDS = 0.5
STOP_SECONDS = 75.0
MAX_WAIT_SECONDS = 60.0
LEASE_SECONDS = 20.0
"""How long a supervisor counts as there after it was heard of last."""


class Supervisor:
    """Watches what is wanted, and keeps a process for it on this machine as long as it is.

    Whether a base fits here the process itself finds out, which knows the device; it ends where there is no memory.

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
        self._id = f"place_{secrets.token_hex(12)}"
        self._attend_at = 0.0

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
        now = time.monotonic()
        if now >= self._attend_at:
            self._record.attend(self._id, self._sources, LEASE_SECONDS)
            self._attend_at = now + LEASE_SECONDS / 4
        for wanted in self._record.wanted_bases():
            base = wanted.base
            is_due = now >= self._not_before.get(base, 0.0)
            if base.name in self._sources and base not in self._processes and is_due:
                self._processes[base] = self._start(wanted)

    def _bury(self) -> None:
        """Forget workers that have ended; one that failed waits longer each time before it is started again."""
        for base, process in list(self._processes.items()):
            if process.poll() is None:
                continue
            del self._processes[base]
            failed = process.returncode != 0
            self._num_failures[base] = self._num_failures.get(base, 0) + 1 if failed else 0
            if failed:
                was_refused = process.returncode == LuthierError.exit_code  # it has said why: mostly, too little memory
                wait = MAX_WAIT_SECONDS if was_refused else min(MAX_WAIT_SECONDS, 2.0 ** self._num_failures[base] / 2)
                self._not_before[base] = time.monotonic() + wait
                told = {"base": str(base), "code": process.returncode, "wait_seconds": wait}
                logger.warning("a worker could not start" if was_refused else "a worker died", extra=told)

    def _start(self, wanted: WantedBase) -> subprocess.Popen[bytes]:
        base = wanted.base
        source = self._sources[base.name]
        named = base.name if source == base.name else f"{base.name}={source}"
        command = [sys.executable, "-m", "luthier.cli.main", "worker", "--base", named, *self._arguments]
        command += ["--quantization", base.quantization] if base.quantization else []
        command += ["--weights", base.weights] if base.weights else []
        command += ["--place", self._id, "--need", str(wanted.need_bytes)]
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
