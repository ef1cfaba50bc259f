"""How one worker of the service works."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from luthier.store.held_base import HeldBase


@dataclass(frozen=True)
class WorkerOptions:
    """How one worker works.

    Attributes:
        base, source: The base's name in jobs, and what it stands for.
        quantization, weights: As in `HeldBase`.
        scratch: A folder of this process's own, which can be lost.
        step_tokens: Most tokens in one training forward.
        max_jobs: Most jobs that train together.
        max_slots: Most adapters that serve from memory.
        lease_seconds: How long the worker may be silent before its jobs go to others.
        idle_seconds: End after this long without a job or request; None never does.
        host, port, address: Where the endpoint listens, and the address that others reach it by.
        threads: CPU threads; None takes all cores.
        place: The supervisor that started it, or None.
        need_bytes: What must be free beyond the base; 0 where nobody in particular waits.
    """

    base: str
    source: str
    scratch: Path
    quantization: str = ""
    weights: str = ""
    step_tokens: int = 256
    max_jobs: int = 16
    max_slots: int = 64
    lease_seconds: float = 15.0
    idle_seconds: float | None = None
    host: str = "127.0.0.1"
    port: int = 0
    address: str | None = None
    threads: int | None = None
    place: str | None = None
    need_bytes: int = 0

    @property
    def held_base(self) -> HeldBase:
        """What the worker holds."""
        return HeldBase(self.base, self.quantization, self.weights)
