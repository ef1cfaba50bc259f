"""The supervisor: a worker for each base that somebody waits for, where the memory for it is free."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.store.held_base import HeldBase
from luthier.worker.supervisor import Supervisor


@dataclass
class Machine:
    """What the supervisor meets: who waits, what memory is free, and the processes that it started."""

    wanted: list[HeldBase] = field(default_factory=list)
    free_bytes: int = 10**12
    started: list[FakeProcess] = field(default_factory=list)

    def wanted_bases(self) -> list[HeldBase]:
        return [base for base in self.wanted if base not in [p.base for p in self.started if p.returncode is None]]


class FakeProcess:
    def __init__(self, command: list[str]) -> None:
        def value(option: str) -> str:
            return command[command.index(option) + 1] if option in command else ""

        self.base = HeldBase(value("--base").partition("=")[0], value("--quantization"), value("--weights"))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        self.returncode = 0

    def wait(self, timeout: float) -> int:
        assert self.returncode is not None
        return self.returncode


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> Iterator[Machine]:
    machine = Machine()

    def start(command: list[str], **_: Any) -> FakeProcess:
        machine.started.append(FakeProcess(command))
        return machine.started[-1]

    monkeypatch.setattr("luthier.worker.supervisor.POLL_SECONDS", 0.01)
    monkeypatch.setattr("luthier.worker.supervisor.MAX_WAIT_SECONDS", 0.1)
    monkeypatch.setattr("luthier.worker.supervisor.subprocess.Popen", start)
    monkeypatch.setattr(
        "luthier.worker.supervisor.psutil.virtual_memory", lambda: SimpleNamespace(available=machine.free_bytes)
    )
    supervisor = Supervisor(machine, {"small": str(tiny_llama), "other": str(tiny_llama)})  # type: ignore[arg-type]
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    yield machine
    supervisor.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert all(process.returncode is not None for process in machine.started), "it ends those that it started"


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_one_worker_a_base_that_is_known_here(machine: Machine) -> None:
    kinds = [
        HeldBase("small"),
        HeldBase("small", "nf4"),
        HeldBase("small", weights="tenants/a/models/b"),
        HeldBase("other"),
    ]
    machine.wanted = [*kinds, HeldBase("of another machine")]
    wait_until(lambda: len(machine.started) == 4)
    time.sleep(0.1)
    assert [process.base for process in machine.started] == kinds
    machine.wanted = [HeldBase("small")]
    machine.started[0].returncode = 0  # it was idle
    wait_until(lambda: len(machine.started) == 5)


def test_a_base_waits_until_there_is_memory_for_it(machine: Machine) -> None:
    machine.free_bytes = 1000
    machine.wanted = [HeldBase("small")]
    time.sleep(0.15)
    assert machine.started == []
    machine.free_bytes = 10**12
    wait_until(lambda: len(machine.started) == 1)


def test_a_worker_that_dies_is_started_again_later_each_time(machine: Machine) -> None:
    machine.wanted = [HeldBase("small")]
    wait_until(lambda: len(machine.started) == 1)
    died_at = time.monotonic()
    machine.started[0].returncode = 1
    wait_until(lambda: len(machine.started) == 2)
    assert time.monotonic() - died_at >= 0.1
