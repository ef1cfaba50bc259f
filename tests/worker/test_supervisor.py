"""The supervisor: a worker for each base that somebody waits for, tried again where it could not start."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from luthier.registry.seam import WantedBase
from luthier.store.held_base import HeldBase
from luthier.worker.supervisor import Supervisor


@dataclass
class Machine:
    """What the supervisor meets: who waits, and the processes that it started."""

    wanted: list[HeldBase] = field(default_factory=list)
    need_bytes: int = 0
    started: list[FakeProcess] = field(default_factory=list)
    attended: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)

    def attend(self, place: str, bases: Collection[str], lease_seconds: float) -> None:
        self.attended.add((place, tuple(bases)))

    def wanted_bases(self) -> list[WantedBase]:
        """Also such as are held: without the memory that somebody needs."""
        return [WantedBase(base, self.need_bytes) for base in self.wanted]


class FakeProcess:
    def __init__(self, command: list[str]) -> None:
        def value(option: str) -> str:
            return command[command.index(option) + 1] if option in command else ""

        self.place, self.need_bytes = value("--place"), int(value("--need"))
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


def test_a_worker_is_told_its_place_and_what_somebody_needs(machine: Machine) -> None:
    machine.need_bytes = 7
    machine.wanted = [HeldBase("small")]
    wait_until(lambda: len(machine.started) == 1)
    assert machine.attended == {(machine.started[0].place, ("small", "other"))}
    assert machine.started[0].need_bytes == 7


def test_a_worker_that_had_no_memory_is_tried_again_much_later(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.worker.supervisor.MAX_WAIT_SECONDS", 1.5)  # one that died waits for a second
    machine.wanted = [HeldBase("small")]
    wait_until(lambda: len(machine.started) == 1)
    ended_at = time.monotonic()
    machine.started[0].returncode = 2
    wait_until(lambda: len(machine.started) == 2)
    assert time.monotonic() - ended_at >= 1.4


def test_a_worker_that_dies_is_started_again_later_each_time(machine: Machine) -> None:
    machine.wanted = [HeldBase("small")]
    wait_until(lambda: len(machine.started) == 1)
    died_at = time.monotonic()
    machine.started[0].returncode = 1
    wait_until(lambda: len(machine.started) == 2)
    assert time.monotonic() - died_at >= 0.1
