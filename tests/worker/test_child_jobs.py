"""Exclusive jobs of a worker that wait for memory: told once, and taken up in order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.registry.seam import Claim
from luthier.worker import child_jobs
from luthier.worker.child_jobs import ChildJob, ChildJobs

GIB = 2**30


class Record:
    """Hears what is told."""

    def __init__(self) -> None:
        self.waits: list[tuple[str, int, int]] = []

    def wait_for_memory(self, claim: Claim, need_bytes: int, free_bytes: int) -> None:
        self.waits.append((claim.job, need_bytes, free_bytes))


def job(name: str, need_bytes: int) -> ChildJob:
    files: Any = SimpleNamespace(claimed=SimpleNamespace(claim=Claim(name, "w", 1)))
    return ChildJob(files, need_bytes)


def test_who_waits_is_told_once_and_starts_when_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def spawn(module: str, order: Any, need_bytes: int, **how: Any) -> Any:
        started.append(need_bytes)
        assert how == {"on_gpu": True}
        return SimpleNamespace(bytes_to_come=need_bytes, has_ended=False, messages=list)

    monkeypatch.setattr(child_jobs.ChildProcess, "spawn", spawn)
    monkeypatch.setattr(child_jobs, "Order", lambda *given: SimpleNamespace(to_dict=dict))
    free, record = [3 * GIB], Record()
    jobs = ChildJobs(
        record,  # type: ignore[arg-type]
        Path("base"),
        256,
        None,
        free_bytes=lambda: free[0],
        is_alone=lambda: False,
        on_gpu=True,
    )
    for name, need in (("large", 5 * GIB), ("small", GIB)):
        jobs.add(job(name, need))
    for _ in range(3):
        jobs.poll()
    assert (started, record.waits) == ([], [("large", 5 * GIB, 3 * GIB)]), "the first in order is waited for"
    free[0] = 5 * GIB
    jobs.poll()
    assert started == [5 * GIB]
    assert record.waits[1:] == [("small", GIB, 0)], "the first has still to take what is free"
    free[0] = 7 * GIB
    jobs.poll()
    assert started == [5 * GIB, GIB]
    assert len(record.waits) == 2
