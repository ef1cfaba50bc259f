"""Watching the processes of one training: what they say is passed on, and the end of one is the end of all."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from luthier.errors import LuthierError, ProcessLostError
from luthier.worker.interrupts import interrupts
from luthier.worker.launch.launcher import Launcher, RankProcess
from luthier.worker.messages import PROGRESS_VERBS, error_of, relay
from luthier.worker.progress import Progress

POLL_SECONDS = 0.05
LAST_WORDS_SECONDS = 1.0
"""Once one has failed, the others may take this long to say what they saw before they are asked to end,"""
END_SECONDS = 5.0
"""and so long to end before they are killed."""
STOP_SECONDS = 120.0
"""How long they may take to save after Ctrl-C."""


@dataclass
class _Member:
    rank: int
    process: RankProcess
    ending: dict[str, Any] | None = None
    has_ended: bool = False

    def poll(self, progress: Progress) -> None:
        """Pass on what it says."""
        has_ended = self.process.has_ended  # asked first, so that nothing said before the end is missed
        for message in self.process.messages():
            if message["verb"] in PROGRESS_VERBS:
                relay(message, progress)
            else:
                self.ending = message
        self.has_ended = has_ended

    @property
    def has_failed(self) -> bool:
        return self.has_ended and (self.ending is None or self.ending["verb"] == "error")


def run_crew(launcher: Launcher, order: dict[str, Any], size: int, progress: Progress) -> list[dict[str, Any]]:
    """Start `size` processes and see them through.

    Args:
        order: As `Launcher.start` takes it.
        progress: Hears what they say.

    Returns:
        The first rank's results, in the order of the recipes.

    Raises:
        LuthierError: the one that ended the training; one from another rank than the first names it.
        ProcessLostError: where a process was killed or ended by a defect; names the rank and how it ended.
        KeyboardInterrupt: after Ctrl-C, once they have saved.
    """
    with interrupts() as asked, TemporaryDirectory(prefix="luthier-") as scratch:
        members = [_Member(n, process) for n, process in enumerate(launcher.start(order, size, Path(scratch)))]
        try:
            order_of_ends = _watch(members, progress, asked)
        finally:
            for member in members:
                member.process.kill()
                member.process.close()
    failed = [member for member in order_of_ends if member.has_failed]
    if failed and not asked:
        raise _error_of(min(failed, key=_guilt), size)
    results = members[0].ending
    if asked or results is None or results["verb"] != "results":
        raise KeyboardInterrupt
    return list(results["results"])


def _watch(members: list[_Member], progress: Progress, asked: list[int]) -> list[_Member]:
    """Until the last has ended, or was killed; returns them in the order of their ends."""
    ended: list[_Member] = []
    stop_at = kill_at = float("inf")
    has_stopped = False
    while len(ended) < len(members):
        for member in members:
            if not member.has_ended:
                member.poll(progress)
                ended += [member] if member.has_ended else []
        now = time.monotonic()
        if kill_at == float("inf"):
            if asked:
                stop_at, kill_at = now, now + STOP_SECONDS
            elif any(member.has_failed for member in ended):
                stop_at, kill_at = now + LAST_WORDS_SECONDS, now + LAST_WORDS_SECONDS + END_SECONDS
        for member in members:
            if now >= kill_at:
                member.process.kill()
            elif now >= stop_at and not has_stopped and not member.has_ended:
                member.process.stop()
        has_stopped = has_stopped or now >= stop_at
        time.sleep(POLL_SECONDS)
    return ended


def _guilt(member: _Member) -> int:
    """Who is to blame first: one that says why, then one that died, then one that only lost the others."""
    if member.ending is None:
        return 1
    return 2 if member.ending["kind"] == ProcessLostError.__name__ else 0


def _error_of(member: _Member, size: int) -> LuthierError:
    where = f"rank {member.rank} of {size} ended the training"
    if member.ending is None:
        return ProcessLostError(
            f"{where}: {member.process.problem()}",
            fix="`luthier train ... --resume` goes on from the last checkpoint, with any number of devices",
        )
    error = error_of(member.ending)
    return error if member.rank == 0 else type(error)(f"{where}: {error.found}", error.expected, error.fix)
